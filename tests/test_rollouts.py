from pathlib import Path

import numpy as np
import pytest
from toy_benchmark import ToyBenchmark

from lar_lightning.__main__ import main
from lar_lightning.alignment import align
from lar_lightning.base_models import load_tokenizer
from lar_lightning.benchmarks import BENCHMARKS
from lar_lightning.errors import SettingError
from lar_lightning.rollouts.roll_out import read_split, roll_out
from lar_lightning.run_folder import trajectory_path
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.settings import RolloutSettings, Style
from lar_lightning.trajectories import Trajectory, TrajectoryFile

SETTINGS = RolloutSettings(
    num_held_out=4, temperatures=(0.0, 1.0), held_out_temperatures=(1.0,), max_tokens=4
)


def rollout_arguments(checkpoint: Path, run_dir: Path, *options: str) -> list[str]:
    return [
        "rollout",
        f"--base_model={checkpoint}",
        f"--run_dir={run_dir}",
        "--benchmark=humaneval",
        "--rollouts.engine=transformers",
        "--rollouts.num_held_out=4",
        "--rollouts.temperatures=[0.0, 1.0]",
        "--rollouts.held_out_temperatures=[1.0]",
        "--rollouts.max_tokens=4",
        *options,
    ]


@pytest.fixture(scope="module")
def rolled_out(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    assert main(rollout_arguments(tiny_checkpoint, run_dir)) == 0
    return run_dir


def test_each_task_gets_one_episode_a_temperature(rolled_out: Path) -> None:
    training = read_split(rolled_out, "train", SETTINGS)
    held_out = read_split(rolled_out, "held_out", SETTINGS)
    assert len(training) == 2 * 160
    assert len(held_out) == 4
    assert not {item.task_id for item in training} & {item.task_id for item in held_out}
    assert sum(item.temperature == 0.0 for item in training) == 160


def test_entropies_stand_at_action_tokens_and_nowhere_else(rolled_out: Path) -> None:
    for trajectory in read_split(rolled_out, "train", SETTINGS)[:20]:
        (action,) = trajectory.action_spans
        assert np.isnan(trajectory.entropies[: action.start]).all()
        assert np.isfinite(trajectory.entropies[action.start :]).all()
        assert 0 < trajectory.horizon <= 4
        assert trajectory.is_finished == (trajectory.token_ids[-1] == 1)


def test_an_interrupted_rollout_goes_on_and_loses_nothing(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    append = TrajectoryFile.append
    num_appended = 0

    def interrupted(self: TrajectoryFile, trajectory: Trajectory) -> None:
        nonlocal num_appended
        if num_appended == 100:
            raise KeyboardInterrupt
        num_appended += 1
        append(self, trajectory)

    monkeypatch.setattr(TrajectoryFile, "append", interrupted)
    assert main(rollout_arguments(tiny_checkpoint, tmp_path)) == 130
    monkeypatch.setattr(TrajectoryFile, "append", append)
    file = trajectory_path(tmp_path, "train")
    before = file.read_text()
    capsys.readouterr()
    assert main(rollout_arguments(tiny_checkpoint, tmp_path)) == 0
    output = capsys.readouterr().out
    reused = [
        int(part.split(" reused")[0].split()[-1])
        for part in output.splitlines()
        if "reused" in part
    ]
    assert sum(reused) == 100
    assert file.read_text().startswith(before)
    assert len(read_split(tmp_path, "train", SETTINGS)) == 320


def test_more_samples_are_added_to_what_is_there(
    rolled_out: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    more = "--rollouts.held_out_temperatures=[1.0, 1.0]"
    assert main(rollout_arguments(tiny_checkpoint, rolled_out, more)) == 0
    output = capsys.readouterr().out
    assert "(held_out): 4 reused" in output
    assert "4 to make" in output
    # A run that asks for fewer reads fewer.
    assert len(read_split(rolled_out, "held_out", SETTINGS)) == 4


def test_a_prompt_that_leaves_no_room_is_refused_before_the_engine_opens(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(rollout_arguments(tiny_checkpoint, tmp_path, "--rollouts.max_model_len=64")) == 2
    assert "`max_model_len`" in capsys.readouterr().err


def toy_settings(style: Style) -> RolloutSettings:
    return RolloutSettings(
        style=style,
        engine="transformers",
        num_held_out=2,
        num_training=3,
        temperatures=(1.0,),
        held_out_temperatures=(0.0,),
        max_tokens=6,
        max_model_len=512,
    )


def test_turns_are_rolled_out_into_one_trajectory(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actions and observations in turn, entropies at actions only, and training can align it."""
    monkeypatch.setitem(BENCHMARKS, "toy", "toy_benchmark:ToyBenchmark")
    settings = toy_settings("react")
    roll_out(tiny_checkpoint, "toy", tmp_path, settings)
    training = read_split(tmp_path, "train", settings)
    assert len(training) == 3
    tokenizer = load_tokenizer(tiny_checkpoint)
    for trajectory in training:
        roles = [span.role for span in trajectory.spans]
        assert roles == ["user", *["assistant", "user"] * 3, "assistant"]
        for span in trajectory.spans:
            is_scored = np.isfinite(trajectory.entropies[span.start : span.end])
            assert is_scored.all() if span.role == "assistant" else not is_scored.any()
        text = tokenizer.decode(trajectory.token_ids)
        assert text.count("<|im_start|>assistant") == 4
        segment = tuple(trajectory.token_ids[slice(*spans_of(trajectory)[1])][:2].tolist())
        latent = LatentAction(
            segment=segment, text="x", num_occurrences=1, support=1, inner_entropy=0.0
        )
        vocabulary = LatentVocabulary([latent], base_size=len(tokenizer))
        aligned = align(vocabulary, trajectory)
        assert len(aligned.target_units) > 0


def spans_of(trajectory: Trajectory) -> list[tuple[int, int]]:
    return [(span.start, span.end) for span in trajectory.action_spans]


def test_a_style_that_the_benchmark_lacks_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Single(ToyBenchmark):
        def __init__(self) -> None:
            super().__init__(styles=("direct",))

    monkeypatch.setitem(BENCHMARKS, "toy", "toy_benchmark:ToyBenchmark")
    monkeypatch.setattr("toy_benchmark.ToyBenchmark", Single)
    with pytest.raises(SettingError, match=r"`rollouts\.style` must be one of direct"):
        roll_out(tiny_checkpoint, "toy", tmp_path, toy_settings("react"))


def test_an_episode_that_cannot_begin_is_left_out_and_said(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    class Closed(ToyBenchmark):
        def open(self, task, style):
            if task.task_id == "toy/0":
                raise OSError("no server")
            return super().open(task, style)

    monkeypatch.setitem(BENCHMARKS, "toy", "toy_benchmark:ToyBenchmark")
    monkeypatch.setattr("toy_benchmark.ToyBenchmark", Closed)
    settings = toy_settings("direct")
    roll_out(tiny_checkpoint, "toy", tmp_path, settings)
    assert "toy/0: OSError: no server" in capsys.readouterr().out
    everything = read_split(tmp_path, "train", settings) + read_split(
        tmp_path, "held_out", settings
    )
    assert "toy/0" not in {trajectory.task_id for trajectory in everything}
