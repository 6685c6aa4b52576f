"""Collapse is noticed: the test itself, its signals, and what is done in a run."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from whole_runs import checkpoint_of, fit_arguments, fit_until, metrics_of

from callbacks import CollapseDetection
from lar_lightning.__main__ import main
from lar_lightning.batches import RowTargets
from lar_lightning.collapse import Monitor, Signal
from lar_lightning.collapse.cusum import Rule, mean_values_to_false_alarm
from lar_lightning.collapse.monitor import SignalTest
from lar_lightning.collapse.usage import ChoicePool, use_of, use_sums
from lar_lightning.errors import SettingError
from lar_lightning.losses.folding import Folding
from tests.benchmarks.collapse import replayed

RECORDINGS = Path(__file__).parent / "recordings"


def values_to_alarm(rule: Rule, deviations: object) -> int | None:
    total = 0.0
    for number, deviation in enumerate(deviations, 1):  # type: ignore[arg-type, var-annotated]
        total = rule.next_sum(total, deviation)
        if rule.is_alarm(total):
            return number
    return None


@pytest.mark.parametrize(("shift", "expected"), [(2.0, 16), (3.5, 4), (5.5, 2), (1.5, None)])
def test_a_shift_is_found_after_threshold_over_its_excess(
    shift: float, expected: int | None
) -> None:
    assert values_to_alarm(Rule(), [shift] * 100) == expected


@pytest.mark.parametrize("patience", [1, 3, 7])
def test_patience_is_the_fewest_values_of_an_alarm(patience: int) -> None:
    rule = Rule(patience=patience)
    assert values_to_alarm(rule, [1e9] * 20) == patience
    assert values_to_alarm(rule, ([1e9] * (patience - 1) + [-20.0]) * 5) is None


def test_false_alarms_are_as_rare_as_the_literature_says() -> None:
    """One-sided, k = 0.5, h = 4: 336 values (Montgomery, Statistical Quality Control, 9.1)."""
    rule = Rule(allowance=0.5, threshold=4.0)
    draw = random.Random(0)
    lengths = [
        values_to_alarm(Rule(allowance=0.5, threshold=4.0), iter(lambda: draw.gauss(0, 1), None))
        for _ in range(800)
    ]
    mean = sum(length for length in lengths if length is not None) / len(lengths)
    # uncapped gains are what the literature has: a cap of 4 on a normal value changes nothing
    assert rule.patience == 1
    assert mean == pytest.approx(336, rel=0.12)
    assert mean_values_to_false_alarm(0.5, 4.0) == pytest.approx(338, rel=0.01)
    # of the rule in use, even with a reference that lies 0.7 spreads too good
    assert mean_values_to_false_alarm(0.8, 8.0) > 1e6


def steps_of_alarms(signal: Signal, values: list[float]) -> list[int]:
    test = SignalTest(signal)
    return [step for step, value in enumerate(values) if test.observe(value, step)]


LOSS = Signal(name="loss", window=10, min_spread=0.1, patience=3)


def noisy(level: list[float], spread: float = 0.1, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [value * (1 + draw.gauss(0, spread)) for value in level]


def test_a_loss_that_falls_and_settles_raises_no_alarm() -> None:
    for seed in range(20):
        level = [0.3 + math.exp(-step / 50) for step in range(1000)]
        assert steps_of_alarms(LOSS, noisy(level, seed=seed)) == []


def test_a_jump_is_found_after_as_many_values_as_patience_asks_for() -> None:
    assert steps_of_alarms(LOSS, noisy([1.0] * 100 + [3.0] * 10)) == [102]


def test_a_slow_rise_is_found_although_each_window_is_like_the_last() -> None:
    rise = [1.0] * 50 + [1.01**step for step in range(150)]
    found = steps_of_alarms(LOSS, noisy(rise, spread=0.03))
    assert len(found) == 1
    assert 70 < found[0] < 120


def test_one_outlier_raises_no_alarm() -> None:
    assert steps_of_alarms(LOSS, [1.0] * 50 + [1e6] + [1.0] * 50) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_an_alarm_at_once_and_once(value: float) -> None:
    assert steps_of_alarms(LOSS, [1.0, value, value, 1.0]) == [1]


def test_an_alarm_is_repeated_only_after_a_recovery() -> None:
    values = [1.0] * 20 + [5.0] * 50 + [1.0] * 20 + [5.0] * 10
    assert steps_of_alarms(LOSS, values) == [22, 92]


def test_what_should_be_high_is_watched_downwards() -> None:
    signal = Signal(name="agreement", bad="down", window=2, min_spread=0.05, patience=1)
    assert steps_of_alarms(signal, [0.5, 0.7, 0.9, 0.9, 0.2]) == [4]
    assert steps_of_alarms(signal, [0.2, 0.5, 0.9, 0.99, 1.0]) == []


def test_a_limit_needs_no_past() -> None:
    signal = Signal(name="ratio", limit=1.0, min_spread=0.25, patience=2)
    assert steps_of_alarms(signal, [9.0, 9.0, 9.0]) == [1]
    assert steps_of_alarms(signal, [1.2] * 500) == []


def test_the_same_number_again_can_be_no_new_value() -> None:
    signal = Signal(name="repetition", limit=0.5, patience=2, skips_repeats=True)
    assert steps_of_alarms(signal, [0.99] * 10) == []
    assert steps_of_alarms(signal, [0.99, 0.99, 0.98]) == [2]


def test_a_loss_of_next_to_nothing_may_double() -> None:
    assert steps_of_alarms(LOSS, [1e-5] * 50 + [1e-3] * 50) == []


def test_a_monitor_that_was_stored_goes_on_as_if_it_had_not_been() -> None:
    values = noisy([1.0] * 30 + [1.6] * 30)
    whole, first = Monitor([LOSS]), Monitor([LOSS])
    expected = [whole.observe({"loss": value}, step) for step, value in enumerate(values)]
    found = [first.observe({"loss": value}, step) for step, value in enumerate(values[:33])]
    second = Monitor([LOSS])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.observe({"loss": v}, step + 33) for step, v in enumerate(values[33:])]
    assert found == expected
    assert any(expected[33:])


def test_a_signal_that_is_watched_otherwise_begins_anew() -> None:
    first, second = Monitor([LOSS]), Monitor([Signal(name="loss", window=5)])
    for step in range(20):
        first.observe({"loss": 1.0}, step)
    second.load_state_dict(first.state_dict())
    assert second.tests["loss"].num_values == 0


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"patience": 0}, {"floor": 0.0}, {"min_spread": -1.0}]
)
def test_signals_that_cannot_be_tested_are_refused(options: dict) -> None:
    with pytest.raises(SettingError, match="'loss'"):
        Signal(name="loss", **options)


def targets(tokens: list[int], units: list[int]) -> RowTargets:
    nothing = torch.zeros(0, dtype=torch.int64)
    return RowTargets(
        tokens=torch.tensor(tokens),
        units=torch.tensor(units),
        is_sampled=torch.zeros(len(tokens), dtype=torch.bool),
        banned_rows=nothing,
        banned_tokens=nothing,
        num_since_latent=torch.full((len(tokens),), -1),
    )


def test_choosing_by_chance_is_1_where_a_latent_is_due_and_where_none_is() -> None:
    """Two latents begin with token 1, one with token 2, none with token 3."""
    folding = Folding([(1, 4), (1, 5), (2, 4)], 6)
    rows = targets([1, 1, 2, 2, 3], [6, 1, 8, 2, 3])
    chance = torch.tensor([3.0, 3.0, 2.0, 2.0, 1.0]).log()
    use = use_of(use_sums(rows, chance, folding))
    assert use.choice == pytest.approx(1.0)
    assert use.underuse == pytest.approx(1.0)
    assert use.overuse == pytest.approx(1.0)
    assert use.adoption == pytest.approx((1 / 3 + 1 / 2) / 2)
    surer = use_of(use_sums(rows, 2 * chance, folding))
    assert surer.underuse == pytest.approx(2.0)


def test_without_latents_there_is_no_use_to_speak_of() -> None:
    use = use_of(use_sums(targets([1, 2], [1, 2]), torch.zeros(2), Folding([], 6)))
    assert use.choice is use.underuse is use.overuse is use.adoption is None


def test_a_student_that_knows_how_seldom_latents_are_due_is_better_than_chance() -> None:
    """One choice of ten is for the latent: where it is due, that student takes many nats."""
    folding = Folding([(1, 4)], 6)
    rows = targets([1] * 10, [6] + [1] * 9)
    split = -torch.tensor([0.1] + [0.9] * 9).log()
    use = use_of(use_sums(rows, split, folding))
    assert use.underuse == pytest.approx(math.log(10) / math.log(2))
    assert use.choice == pytest.approx(0.469, abs=1e-3)  # the entropy, in bits


def test_choices_of_several_steps_are_one_value() -> None:
    folding = Folding([(1, 4)], 6)
    pool = ChoicePool()
    found = []
    for number in range(30):
        rows = targets([1, 2], [6 if number % 2 else 1, 2])
        split = torch.tensor([0.5 if number % 2 else 1.0, 0.0])
        found.append(pool.take_in(use_sums(rows, split, folding)))
    values = [value for value in found if value is not None]
    assert len(values) == 1  # 24 rows with a choice are 16 nats of chance
    assert values[0] == pytest.approx(0.75 / math.log(2), abs=0.03)


DELAYS = {
    ("rate", 60): 5,
    ("entropy", 60): 5,
    ("shuffled", 60): 5,
    ("frozen", 60): 5,
    ("rate", 0): 15,
    ("entropy", 0): 15,
    ("shuffled", 0): 1,
    ("frozen", 0): 1,
}
"""Most steps until a collapse is found, by its kind and the step where it was planted. The runs are
of 100 steps, of which 10 are warm-up: `python -m tests.benchmarks.collapse --record FOLDER`."""


@pytest.mark.parametrize("file", sorted(RECORDINGS.glob("none-*.csv")), ids=lambda f: f.stem)
def test_recorded_healthy_runs_raise_no_alarm(file: Path) -> None:
    assert replayed(file) == []


@pytest.mark.parametrize(("kind", "at_step"), DELAYS)
def test_recorded_collapses_are_found_within_the_stated_delay(kind: str, at_step: int) -> None:
    (file,) = RECORDINGS.glob(f"{kind}-from-{at_step}-*.csv")
    first = replayed(file)[0]
    assert 0 < first.step - at_step <= DELAYS[kind, at_step]


PLANTED = (
    "--trainer.max_steps=50",
    "--trainer.max_epochs=-1",
    "--model.trainable=lora",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.val_check_interval=8",
    "--trainer.log_every_n_steps=1",
    "--checkpoint.every_n_train_steps=1",
    "--model.learning_rate=0.075",
    "--trainer.callbacks+=tests.benchmarks.plants.Plant",
    "--trainer.callbacks.kind=rate",
    "--trainer.callbacks.at_step=28",
    "--trainer.callbacks+=callbacks.CollapseDetection",
)


@pytest.fixture(scope="module")
def restored_run(
    rolled_out: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The learning rate is multiplied by 100 at step 28."""
    folder = Path(shutil.copytree(rolled_out, tmp_path_factory.mktemp("restored") / "run"))
    actions = "--trainer.callbacks.actions=[stop,restore_best,lower_rate]"
    assert main(fit_arguments(folder, tiny_checkpoint, *PLANTED, actions)) == 0
    return folder


def alarms_of(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics" / "collapse.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_collapse_ends_the_run_with_the_best_weights(restored_run: Path) -> None:
    first = alarms_of(restored_run)[0]
    assert 28 < first["step"] <= 38
    assert first["done"] == (
        "the weights of step 24 are back, the learning rate is multiplied by 0.3, training stops"
    )
    last = checkpoint_of(restored_run)
    best = torch.load(restored_run / "checkpoints" / "best.ckpt", weights_only=True)
    assert last["global_step"] == first["step"]
    assert best["global_step"] == 24
    assert all(torch.equal(last["state_dict"][name], v) for name, v in best["state_dict"].items())
    assert not last["optimizer_states"][0]["state"]
    # what was logged last is the best weights' again
    losses = metrics_of(restored_run, "val/loss_nats")
    assert losses[-1] == pytest.approx(losses[-2], abs=1e-6)
    assert metrics_of(restored_run, "collapse/alarm")[-1] == len(alarms_of(restored_run))


def test_a_lowered_rate_is_in_the_checkpoint(restored_run: Path) -> None:
    (schedule,) = checkpoint_of(restored_run)["lr_schedulers"]
    adapters = schedule["base_lrs"][-1]
    assert adapters == pytest.approx(1e-3 * 100 * 0.3)


def test_a_stopped_run_says_so_when_it_is_started_again(
    restored_run: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    actions = "--trainer.callbacks.actions=[stop,restore_best,lower_rate]"
    step = checkpoint_of(restored_run)["global_step"]
    assert main(fit_arguments(restored_run, tiny_checkpoint, *PLANTED, actions)) == 0
    assert "collapse: this run was stopped" in capsys.readouterr().out
    assert checkpoint_of(restored_run)["global_step"] == step


def state_of(run_dir: Path) -> dict:
    return checkpoint_of(run_dir)["callbacks"]["CollapseDetection"]


def test_a_run_that_was_stopped_by_hand_tests_on_where_it_was(
    run_dir: Path, restored_run: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the collapse and its alarm; the same alarms, and the same weights."""
    actions = "--trainer.callbacks.actions=[stop,restore_best,lower_rate]"
    arguments = fit_arguments(run_dir, tiny_checkpoint, *PLANTED, actions)
    fit_until(29, arguments, monkeypatch)
    assert state_of(run_dir)["num_alarms"] == 0
    # planted once: the rate is in the checkpoint
    again = [a.replace("callbacks.kind=rate", "callbacks.kind=none") for a in arguments]
    assert main(again) == 0
    assert alarms_of(run_dir) == alarms_of(restored_run)
    assert state_of(run_dir) == state_of(restored_run)
    weights, expected = (checkpoint_of(r)["state_dict"] for r in (run_dir, restored_run))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("kind", "initialization", "is_found"),
    [
        ("shuffled", "first_last", True),
        ("none", "first_last", False),
        ("none", "constituents", False),
        ("none", "mean", False),  # is not as likely as the first token, and need not be
    ],
)
def test_rows_that_belong_to_other_segments_are_found_at_the_first_step(
    kind: str, initialization: str, is_found: bool, run_dir: Path, tiny_checkpoint: Path
) -> None:
    options = (
        "--trainer.max_steps=2",
        f"--model.initialization={initialization}",
        "--trainer.callbacks+=tests.benchmarks.plants.Plant",
        f"--trainer.callbacks.kind={kind}",
        "--trainer.callbacks+=callbacks.CollapseDetection",
    )
    assert main(fit_arguments(run_dir, tiny_checkpoint, *options)) == 0
    has_alarms = (run_dir / "metrics" / "collapse.jsonl").exists()
    assert has_alarms == is_found
    if is_found:
        assert [(a["signal"], a["step"]) for a in alarms_of(run_dir)] == [
            ("collapse/misplaced_rows", 1)
        ]


def test_choices_that_wait_for_more_are_in_the_checkpoint() -> None:
    first, second = CollapseDetection(), CollapseDetection()
    first.pool.take_in(torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0]))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.pool.nats, second.pool.chance) == (4.0, 6.0)


def test_unknown_actions_are_refused() -> None:
    with pytest.raises(SettingError, match="Did you mean 'stop'"):
        CollapseDetection(actions=("stopp",))  # type: ignore[arg-type]


def test_a_watched_metric_that_never_comes_is_told(run_dir: Path, tiny_checkpoint: Path) -> None:
    options = (
        "--trainer.max_steps=2",
        "--trainer.callbacks+=callbacks.CollapseDetection",
        "--trainer.callbacks.signals=[{name: val/los_nats, when: validation}]",
    )
    with pytest.warns(UserWarning, match="has seen no value behind its warm-up: val/los_nats"):
        assert main(fit_arguments(run_dir, tiny_checkpoint, *options)) == 0
