"""Abstraction is raised in stages until it costs too much."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from whole_runs import checkpoint_of, fit_arguments, fit_until

from lar_lightning.__main__ import main
from lar_lightning.abstraction.curve import verdict
from lar_lightning.abstraction.stages import check_order, sizes_by_rate, sizes_by_share
from lar_lightning.alignment import align
from lar_lightning.batches import collate
from lar_lightning.errors import SettingError
from lar_lightning.losses.distillation import distillation_loss
from lar_lightning.mining.corpus import corpus_of
from lar_lightning.mining.coverage import rate
from lar_lightning.models.student import Student, load_student
from lar_lightning.run_folder import trajectory_path
from lar_lightning.segments import LatentVocabulary
from lar_lightning.trajectories import read_trajectories
from tests.benchmarks.abstraction import savings

STAGES = (
    "--trainer.max_epochs=3",
    "--checkpoint.every_n_train_steps=1",
    "--trainer.log_every_n_steps=1",
    "--model.trainable=lora",
    "--model.learning_rate=0.075",
    "--trainer.callbacks+=callbacks.CollapseDetection",
)
SCHEDULE = (
    "--trainer.callbacks+=callbacks.AbstractionSchedule",
    "--trainer.callbacks.shares=[0.25,0.5,1.0]",
)
EASY = (*STAGES, *SCHEDULE, "--trainer.callbacks.max_nats_per_token=50")


def test_shares_of_a_vocabulary_are_numbers_of_latents() -> None:
    assert sizes_by_share(12, (0.25, 0.5, 1.0)) == (3, 6, 12)
    assert sizes_by_share(3, (0.01, 0.5, 1.0)) == (1, 2, 3)


@pytest.mark.parametrize(
    "shares", [(), (0.0, 1.0), (0.5, 1.5), (0.5, 0.5), (0.5, 0.25), (0.3, 0.35)]
)
def test_shares_that_do_not_grow_by_a_latent_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(SettingError, match="`shares`"):
        sizes_by_share(4, shares)


@pytest.mark.parametrize(
    ("nats", "num_alarms", "score", "reason"),
    [
        (0.4, 0, None, ""),
        (0.4, 0, 0.9, ""),
        (0.6, 0, None, "0.6 nats a token are above 0.5"),
        (float("nan"), 0, None, "nan nats a token are above 0.5"),
        (0.4, 2, None, "2 alarms of collapse"),
        (0.4, 0, 0.1, "the score 0.1 is below 0.3"),
    ],
)
def test_a_stage_holds_within_its_limits(
    nats: float, num_alarms: int, score: float | None, reason: str
) -> None:
    assert verdict(nats, 0.5, num_alarms, score, 0.3) == reason


@pytest.fixture(scope="module")
def scheduled(
    rolled_out: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Three stages of an epoch, ten steps each, that all hold."""
    folder = Path(shutil.copytree(rolled_out, tmp_path_factory.mktemp("scheduled") / "run"))
    assert main(fit_arguments(folder, tiny_checkpoint, *EASY)) == 0
    return folder


def curve_of(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics" / "abstraction.csv").open() as file:
        return list(csv.DictReader(file))


def test_stages_that_hold_lead_to_the_whole_vocabulary(scheduled: Path) -> None:
    curve = curve_of(scheduled)
    assert [row["num_latents"] for row in curve] == ["3", "6", "12"]
    assert [row["step"] for row in curve] == ["10", "20", "30"]
    assert [row["holds"] for row in curve] == ["1", "1", "1"]
    savings = [float(row["saving"]) for row in curve]
    assert savings == sorted(savings)
    assert savings[-1] > savings[0]
    assert len(LatentVocabulary.load(scheduled / "boundary_vocabulary.json")) == 12
    assert checkpoint_of(scheduled)["latent_actions"]["num_active"] == 12


def test_a_stage_measures_what_its_latents_save_on_held_out_text(scheduled: Path) -> None:
    vocabulary = LatentVocabulary.load(scheduled)
    held_out = corpus_of(read_trajectories(trajectory_path(scheduled, "held_out")))
    for row in curve_of(scheduled):
        found = rate(held_out, vocabulary.first(int(row["num_latents"])).automaton)
        assert float(row["rate"]) == pytest.approx(found, abs=0.02)  # rows without a pair


def test_a_rate_takes_the_fewest_latents_that_reach_it(scheduled: Path) -> None:
    vocabulary = LatentVocabulary.load(scheduled)
    corpus = corpus_of(read_trajectories(trajectory_path(scheduled, "train")))
    rates = [rate(corpus, vocabulary.first(size).automaton) for size in (2, 7)]
    assert sizes_by_rate(vocabulary, corpus, rates) == (2, 7)
    with pytest.raises(SettingError, match="`rates` must be above 0 and up to"):
        sizes_by_rate(vocabulary, corpus, (0.99,))


def test_latents_out_of_order_are_refused(scheduled: Path) -> None:
    vocabulary = LatentVocabulary.load(scheduled)
    check_order(vocabulary)
    latents = [replace(vocabulary.latents[0], inner_entropy=9.0), *vocabulary.latents[1:]]
    with pytest.raises(SettingError, match="in the order of inner entropy"):
        check_order(LatentVocabulary(latents, base_size=vocabulary.base_size))


@pytest.fixture(scope="module")
def students(scheduled: Path, tiny_checkpoint: Path) -> tuple[Student, Student]:
    """One with twelve latents of which five are in play, and one that has these five alone."""
    vocabulary = LatentVocabulary.load(scheduled)
    whole = load_student(tiny_checkpoint, vocabulary)
    whole.activate(5)
    return whole, load_student(tiny_checkpoint, vocabulary.first(5))


def test_latents_out_of_play_get_no_probability_and_no_gradient(
    students: tuple[Student, Student], scheduled: Path
) -> None:
    vocabulary = LatentVocabulary.load(scheduled).first(5)
    trajectories = read_trajectories(trajectory_path(scheduled, "train"))[:8]
    batch = collate([align(vocabulary, trajectory) for trajectory in trajectories])
    losses, gradients = [], []
    for student in students:
        teacher = student.teacher_hidden(batch.teacher_ids, batch.teacher_mask)
        hidden = student.student_hidden(batch.student_ids, batch.student_mask)
        loss, _ = distillation_loss(
            teacher.flatten(0, 1)[batch.teacher_rows],
            hidden.flatten(0, 1)[batch.student_rows],
            student.heads,
            batch.targets,
            student.folding,
        )
        loss.backward()
        losses.append(loss.detach())
        gradients.append([rows.grad for rows in student.rows.parameters()])
    assert torch.equal(losses[0], losses[1])
    for whole, alone in zip(*gradients, strict=True):
        assert whole is not None
        assert alone is not None
        assert alone.any()
        assert torch.equal(whole[:5], alone)
        assert not whole[5:].any()


@pytest.mark.parametrize("num_steps_before", [10, 14, 30])
def test_a_schedule_that_was_stopped_ends_like_one_that_was_not(
    num_steps_before: int,
    run_dir: Path,
    scheduled: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped where a stage begins, within it, and when all is done."""
    if num_steps_before == 30:
        shutil.rmtree(run_dir)
        shutil.copytree(scheduled, run_dir)
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EASY)
    if num_steps_before < 30:
        fit_until(num_steps_before, arguments, monkeypatch)
    assert checkpoint_of(run_dir)["global_step"] == num_steps_before
    assert main(arguments) == 0
    assert curve_of(run_dir) == curve_of(scheduled)
    weights, expected = (checkpoint_of(folder)["state_dict"] for folder in (run_dir, scheduled))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_collapse_goes_back_to_the_stage_that_held_and_exports_its_latents(
    run_dir: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    """The learning rate is multiplied by 100 in the second stage.

    Stages of 20 steps: an alarm within 10 was a matter of the seed (one of five), here none is.
    """
    plant = (
        "--trainer.callbacks+=tests.benchmarks.plants.Plant",
        "--trainer.callbacks.kind=rate",
        "--trainer.callbacks.at_step=21",
    )
    detect = ("--trainer.callbacks+=callbacks.CollapseDetection",)
    options = (*STAGES[:-1], *plant, *detect, *SCHEDULE)
    longer = ("--trainer.callbacks.max_nats_per_token=50", "--trainer.max_epochs=6")
    assert main(fit_arguments(run_dir, tiny_checkpoint, *options, *longer)) == 0
    said = capsys.readouterr().out
    assert "abstraction: boundary: 3 of 12 latents hold" in said
    curve = curve_of(run_dir)
    assert [row["holds"] for row in curve] == ["1", "0"]
    assert "alarms of collapse" in curve[1]["reason"]
    last = checkpoint_of(run_dir)
    held = torch.load(run_dir / "checkpoints" / "held.ckpt", weights_only=True)
    assert held["global_step"] == 20
    assert last["latent_actions"]["num_active"] == 3
    assert all(torch.equal(last["state_dict"][k], v) for k, v in held["state_dict"].items())
    common = [f"--base_model={tiny_checkpoint}", f"--run_dir={run_dir}"]
    assert main(["export", *common]) == 0
    assert len(LatentVocabulary.load(run_dir / "export")) == 3
    assert (run_dir / "export" / "latent_vocabulary.json").read_text() == (
        run_dir / "boundary_vocabulary.json"
    ).read_text()
    # the same command says that it is done, and changes nothing
    assert main(fit_arguments(run_dir, tiny_checkpoint, *options, *longer)) == 0
    assert "abstraction: finished before" in capsys.readouterr().out
    assert checkpoint_of(run_dir)["global_step"] == last["global_step"]


def test_where_no_stage_holds_nothing_is_left_but_the_base_model(
    run_dir: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    strict = (*STAGES, *SCHEDULE, "--trainer.callbacks.max_nats_per_token=1.0e-6")
    assert main(fit_arguments(run_dir, tiny_checkpoint, *strict)) == 0
    assert "boundary: 0 of 12 latents hold" in capsys.readouterr().out
    state = checkpoint_of(run_dir)["state_dict"]
    assert not any(value.any() for name, value in state.items() if "lora_B" in name)
    assert len(LatentVocabulary.load(run_dir / "boundary_vocabulary.json")) == 0
    assert main(["export", f"--base_model={tiny_checkpoint}", f"--run_dir={run_dir}"]) == 0
    assert len(LatentVocabulary.load(run_dir / "export")) == 0


def test_the_benchmark_ends_a_schedule_at_the_first_stage_beyond_the_limit() -> None:
    def rows(*points: tuple[float, float]) -> list[dict[str, str]]:
        return [{"nats_per_token": str(n), "saving": str(s), "reason": ""} for n, s in points]

    schedule, fixed = rows((0.2, 0.04), (0.5, 0.07), (0.3, 0.09)), rows((0.2, 0.04), (0.4, 0.07))
    assert savings(schedule, fixed) == [
        (0.2, 0.04, 0.04),
        (0.3, 0.04, 0.04),
        (0.4, 0.04, 0.07),
        (0.5, 0.09, 0.07),
    ]
    fixed[1]["reason"] = "1 alarms of collapse"
    assert savings(schedule, fixed)[-1] == (0.5, 0.09, 0.04)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--trainer.max_epochs=4",), "`trainer.max_epochs` must be a multiple of the 3 stages"),
        (("--trainer.max_steps=5",), "`trainer.max_steps` must be -1"),
        (("--trainer.callbacks.max_nats_per_token=0",), "`max_nats_per_token` must be above 0"),
        (
            (
                "--trainer.callbacks+=callbacks.CollapseDetection",
                "--trainer.callbacks.actions=[stop]",
            ),
            "`actions` of CollapseDetection must be warn alone",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_training(
    options: tuple[str, ...],
    rule: str,
    run_dir: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    common = (*STAGES[:-1], *SCHEDULE, "--trainer.callbacks.max_nats_per_token=50")
    assert main(fit_arguments(run_dir, tiny_checkpoint, *common, *options)) == 2
    assert rule in capsys.readouterr().err
    assert not (run_dir / "checkpoints").exists()
