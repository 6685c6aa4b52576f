"""Faults that end processes: each is injected for real, and the run goes on by the same command."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import TEN_STEPS, checkpoint_of, fit_arguments

from lar_lightning.recovery.checkpoints import LAST, is_whole, next_path, previous_path
from tests.processes import Running, start_ranks

pytestmark = pytest.mark.faults

EVERY_STEP = (*TEN_STEPS, "--checkpoint.every_n_train_steps=1")


def checkpoints(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def same_weights(run_dir: Path, other: Path) -> bool:
    resumed, whole = checkpoint_of(run_dir)["state_dict"], checkpoint_of(other)["state_dict"]
    return all(torch.equal(resumed[name], value) for name, value in whole.items())


def dawdle_in_writing() -> None:
    """Write checkpoints slowly: half of the bytes, a pause, the rest."""
    import importlib

    io: Any = importlib.import_module("lightning.fabric.plugins.io.torch_io")
    save = io._atomic_save

    def slowly(checkpoint: object, path: object) -> None:
        save(checkpoint, path)
        content = Path(str(path)).read_bytes()
        with Path(str(path)).open("wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            time.sleep(0.15)
            file.write(content[len(content) // 2 :])

    io._atomic_save = slowly


def test_run_killed_at_any_moment_ends_like_one_that_was_not(
    run_dir: Path, trained: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Killed again and again, in steps and in the middle of writing, until it is through."""
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EVERY_STEP)
    moments = random.Random(0)
    kept = checkpoints(run_dir) / LAST
    reached = [0]
    for kill in range(6):
        running = Running(arguments, tmp_path / f"{kill}.txt", prepare=dawdle_in_writing)
        if kill % 2:  # half-written: there, and not whole
            running.wait_for(lambda: next_path(kept).exists() and not is_whole(next_path(kept)))
        else:
            before = kept.stat().st_mtime_ns if kept.exists() else 0
            running.wait_for(
                lambda before=before: kept.exists() and kept.stat().st_mtime_ns > before
            )
            time.sleep(moments.uniform(0, 0.3))
        running.send(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        reached.append(checkpoint_of(run_dir)["global_step"])
        assert reached[-1] >= reached[-2], "a finished step is lost"
    assert reached[-1] > 2
    last = Running(arguments, tmp_path / "last.txt")
    assert last.wait() == 0, last.said
    assert "goes on from" in last.said
    assert same_weights(run_dir, trained)


def test_run_goes_on_from_the_checkpoint_before_a_torn_one_and_says_so(
    run_dir: Path, trained: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EVERY_STEP)
    running = Running(arguments, tmp_path / "first.txt", prepare=dawdle_in_writing)
    running.wait_for(previous_path(checkpoints(run_dir) / LAST).exists)
    running.send(signal.SIGKILL)
    running.wait()
    last = checkpoints(run_dir) / LAST
    content = last.read_bytes()
    last.write_bytes(content[: len(content) * 2 // 3])
    resumed = Running(arguments, tmp_path / "second.txt")
    assert resumed.wait() == 0, resumed.said
    assert f"goes on from {checkpoints(run_dir)}" in resumed.said
    assert "last.ckpt is torn or missing" in resumed.said
    assert same_weights(run_dir, trained)


def test_plain_sigterm_ends_a_run_within_a_minute_and_it_goes_on(
    run_dir: Path, trained: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EVERY_STEP)
    running = Running(arguments, tmp_path / "first.txt", prepare=dawdle_in_writing)
    running.wait_for((checkpoints(run_dir) / LAST).exists)
    running.send(signal.SIGTERM)
    assert running.wait(60) == 128 + signal.SIGTERM, running.said
    assert "stopped by SIGTERM" in running.said
    assert is_whole(checkpoints(run_dir) / LAST)
    assert 0 < checkpoint_of(run_dir)["global_step"] < 10
    resumed = Running(arguments, tmp_path / "second.txt")
    assert resumed.wait() == 0, resumed.said
    assert "goes on from" in resumed.said
    assert same_weights(run_dir, trained)


def test_second_fit_in_a_run_folder_is_refused_and_the_first_goes_on(
    run_dir: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EVERY_STEP)
    first = Running(arguments, tmp_path / "first.txt")
    first.wait_for((checkpoints(run_dir) / LAST).exists)
    first.send(signal.SIGSTOP)
    second = Running(arguments, tmp_path / "second.txt")
    assert second.wait() == 2
    first.send(signal.SIGCONT)
    assert f"in use by another `fit`, but {run_dir} is, by process {first.pid} on" in second.said
    assert first.wait() == 0, first.said
    assert checkpoint_of(run_dir)["global_step"] == 10


def spoil_batch(step: int, rank: int) -> None:
    """Make the loss of one rank NaN at a step."""
    from lar_lightning.module import LatentActionModule

    hidden = LatentActionModule._hidden

    def spoiled(self, batch, **options):  # type: ignore[no-untyped-def]
        teacher, student = hidden(self, batch, **options)
        if self.global_step == step and self.global_rank == rank and self.trainer.training:
            student = student * torch.nan
        return teacher, student

    LatentActionModule._hidden = spoiled  # type: ignore[method-assign]


def end_rank(step: int, rank: int) -> None:
    """Kill the process of one rank in a step."""
    from lar_lightning.module import LatentActionModule

    training_step = LatentActionModule.training_step

    def ending(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        if self.global_step == step and self.global_rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, batch, batch_idx)

    LatentActionModule.training_step = ending  # type: ignore[method-assign]


def end_in_preparing(rank: int) -> None:
    """Kill the process that prepares the data of all."""
    from data_modules.trajectories import TrajectoryDataModule

    def ending(self) -> None:  # type: ignore[no-untyped-def]
        time.sleep(1)  # the other waits by then
        os.kill(os.getpid(), signal.SIGKILL)

    TrajectoryDataModule.prepare_data = ending  # type: ignore[method-assign]


def ended(ranks: list[Running]) -> tuple[list[int | None], float]:
    """Return how all processes ended, and the seconds between the first and the last."""
    from multiprocessing.connection import wait

    wait([rank.process.sentinel for rank in ranks], 300)
    start = time.monotonic()
    statuses = [rank.wait(60) for rank in ranks]
    return statuses, time.monotonic() - start


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_stops_the_other_within_a_minute_and_the_run_goes_on(
    rank: int, run_dir: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EVERY_STEP)
    ranks = start_ranks(arguments, tmp_path, prepare=end_rank, options=(3, rank))
    statuses, seconds = ended(ranks)
    other = ranks[1 - rank].said
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] == 2, other
    assert seconds < 60
    assert "error: all processes of a run must stay alive" in other
    assert checkpoint_of(run_dir)["global_step"] == 3
    again = start_ranks(arguments, tmp_path)
    assert [process.wait() for process in again] == [0, 0], again[0].said
    assert "goes on from" in again[0].said
    assert checkpoint_of(run_dir)["global_step"] == 10


def test_killed_child_of_lightnings_own_launcher_stops_the_run_and_leaves_no_process(
    run_dir: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    both = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu")
    arguments = fit_arguments(run_dir, tiny_checkpoint, "--trainer.max_steps=100000", *both)
    arguments += ["--trainer.max_epochs=-1", "--trainer.limit_val_batches=0"]
    output = tmp_path / "out.txt"
    with output.open("w") as file:
        first = subprocess.Popen(
            [sys.executable, "-m", "lar_lightning", *arguments],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        end = time.monotonic() + 240
        while not (checkpoints(run_dir) / LAST).exists():
            assert first.poll() is None, output.read_text()
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.05)
        (second,) = children_of(first.pid)
        os.kill(second, signal.SIGKILL)
        assert first.wait(60) != 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)  # the group that this test has started
    assert "all processes of a run must stay alive" in output.read_text()
    assert not Path(f"/proc/{second}/exe").exists()
    assert is_whole(checkpoints(run_dir) / LAST)


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_nan_on_one_rank_stops_both_with_the_reason(
    run_dir: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EVERY_STEP)
    ranks = start_ranks(arguments, tmp_path, prepare=spoil_batch, options=(2, 1))
    statuses, seconds = ended(ranks)
    assert statuses == [2, 2], [rank.said for rank in ranks]
    assert seconds < 60
    for rank in ranks:
        assert "the loss must be finite, got nan at step 2" in rank.said
        assert "(process 1)" in rank.said
    assert checkpoint_of(run_dir)["global_step"] == 2


def test_rank_that_dies_while_it_prepares_data_stops_the_other(
    run_dir: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EVERY_STEP)
    ranks = start_ranks(arguments, tmp_path, prepare=end_in_preparing, options=(0,))
    statuses, seconds = ended(ranks)
    assert statuses == [-signal.SIGKILL, 2], ranks[1].said
    assert seconds < 60
    assert "all processes of a run must stay alive" in ranks[1].said
