from pathlib import Path

import numpy as np
import pytest

from lar_lightning.__main__ import main
from lar_lightning.rollouts import read_split, trajectory_path
from lar_lightning.settings import RolloutSettings
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
