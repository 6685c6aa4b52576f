"""Faults of memory, disks and network, injected into processes of their own."""

import json
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from whole_runs import TEN_STEPS, checkpoint_of, fit_arguments

from lar_lightning.recovery.checkpoints import LAST, is_whole
from lar_lightning.run_folder import trajectory_path
from tests.processes import Running, free_port

pytestmark = pytest.mark.faults

EVERY_STEP = (*TEN_STEPS, "--checkpoint.every_n_train_steps=1")
IS_ROOT = os.geteuid() == 0


def limit_file_size(step: int) -> None:
    """Let no file grow from a step on, as on a full disk."""
    from lar_lightning.module import LatentActionModule

    training_step = LatentActionModule.training_step

    def limited(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        if self.global_step == step:
            size = (self.run_dir / "checkpoints" / LAST).stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return training_step(self, batch, batch_idx)

    LatentActionModule.training_step = limited  # type: ignore[method-assign]


def limit_memory(step: int, num_bytes: int) -> None:
    """Leave a process little more memory than it has at a step, and ask for more."""
    import torch

    from lar_lightning.module import LatentActionModule

    training_step = LatentActionModule.training_step

    def limited(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        if self.global_step == step:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            size = pages * resource.getpagesize() + num_bytes
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            torch.empty(2 * num_bytes, dtype=torch.uint8)
        return training_step(self, batch, batch_idx)

    LatentActionModule.training_step = limited  # type: ignore[method-assign]


def become_nobody() -> None:
    """Give up the rights of root, for whom no file is closed."""
    os.setgid(65534)
    os.setuid(65534)


def test_disk_that_fills_in_training_is_named_and_the_last_checkpoint_is_kept(
    run_dir: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EVERY_STEP)
    running = Running(arguments, tmp_path / "out.txt", prepare=limit_file_size, options=(3,))
    assert running.wait() == 2, running.said
    assert "error: `run_dir` must be a place with room" in running.said
    assert "File too large" in running.said
    assert is_whole(run_dir / "checkpoints" / LAST)
    assert checkpoint_of(run_dir)["global_step"] == 3
    resumed = Running(arguments, tmp_path / "resumed.txt")
    assert resumed.wait() == 0, resumed.said
    assert checkpoint_of(run_dir)["global_step"] == 10


def test_step_that_does_not_fit_in_memory_names_the_settings_that_help(
    run_dir: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EVERY_STEP)
    options = (2, 256 * 2**20)
    running = Running(arguments, tmp_path / "out.txt", prepare=limit_memory, options=options)
    assert running.wait() == 2, running.said
    assert "error: a step must fit in memory" in running.said
    assert "`model.rows_per_chunk`" in running.said
    assert checkpoint_of(run_dir)["global_step"] == 2


def test_trajectories_that_may_not_be_read_are_named(
    run_dir: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = trajectory_path(run_dir, "train")
    file.chmod(0)
    prepare = become_nobody if IS_ROOT else None
    for folder in (*run_dir.parents, *tiny_checkpoint.parents):
        if folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    run_dir.chmod(0o777)
    tiny_checkpoint.chmod(0o777)
    for path in (*run_dir.rglob("*"), *tiny_checkpoint.rglob("*")):
        if path != file:
            path.chmod(0o777)
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EVERY_STEP)
    running = Running(arguments, tmp_path / "out.txt", prepare=prepare)
    assert running.wait() == 2, running.said
    assert f"{file} must be readable, got Permission denied" in running.said


@pytest.fixture
def read_only(run_dir: Path, tmp_path: Path) -> Iterator[Path]:
    """The run folder on a file system that is mounted without the right to write."""
    place = tmp_path / "mounted"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system wants the rights of root")
    try:
        folder = Path(shutil.copytree(run_dir, place / "run"))
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        yield folder
    finally:
        subprocess.run(["umount", place], check=True)


def test_read_only_run_folder_is_refused_before_anything_is_read(
    read_only: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = fit_arguments(read_only, tiny_checkpoint, *EVERY_STEP)
    running = Running(arguments, tmp_path / "out.txt")
    assert running.wait() == 2, running.said
    assert "Read-only file system" in running.said
    assert "choose another `run_dir`" in running.said


def test_run_without_its_wandb_server_trains_on_and_keeps_its_data(
    run_dir: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    logger = [
        "--trainer.logger=lar_lightning.tracking.tracked_run.TrackedRun",
        "--trainer.logger.connect_seconds=2",
        "--trainer.logger.finish_seconds=5",
        f"--trainer.logger.save_dir={run_dir}",
    ]
    environment = {
        "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}",
        "WANDB_API_KEY": "0" * 40,
    }
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EVERY_STEP, *logger)
    running = Running(arguments, tmp_path / "out.txt", environment=environment)
    assert running.wait() == 0, running.said
    assert "W&B cannot be reached" in running.said
    assert checkpoint_of(run_dir)["global_step"] == 10
    (kept,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert kept.stat().st_size > 1000


class WandbServer(BaseHTTPRequestHandler):
    """Answers as much as a run needs to begin."""

    ANSWERS: ClassVar = {
        "createRunFiles": {"runID": "UQ==", "uploadHeaders": [], "files": []},
        "viewer": {"id": "1", "entity": "us", "username": "us", "teams": {"edges": []}},
        "upsertBucket": {
            "inserted": True,
            "bucket": {
                "id": "UQ==",
                "name": "run",
                "displayName": "run",
                "config": "{}",
                "historyLineCount": 0,
                "project": {"id": "UA==", "name": "tests", "entity": {"id": "RQ==", "name": "us"}},
            },
        },
    }

    def do_POST(self) -> None:
        query = self.rfile.read(int(self.headers.get("content-length") or 0)).decode()
        answer = {name: value for name, value in self.ANSWERS.items() if name in query}
        content = json.dumps({"data": answer} if self.path == "/graphql" else {}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *_: object) -> None:
        """Say nothing."""


def test_run_that_loses_its_wandb_server_trains_on_and_ends_in_time(
    run_dir: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    logger = [
        "--trainer.logger=lar_lightning.tracking.tracked_run.TrackedRun",
        "--trainer.logger.project=tests",
        "--trainer.logger.finish_seconds=5",
        f"--trainer.logger.save_dir={run_dir}",
    ]
    environment = {
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_API_KEY": "0" * 40,
    }
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EVERY_STEP, *logger)
    running = Running(arguments, tmp_path / "out.txt", environment=environment)
    running.wait_for((run_dir / "checkpoints" / LAST).exists)
    server.shutdown()
    server.server_close()
    assert running.wait() == 0, running.said
    assert "Tracking run with wandb" in running.said
    assert "`wandb sync` brings it up" in running.said
    assert checkpoint_of(run_dir)["global_step"] == 10
    (kept,) = run_dir.glob("wandb/run-*/run-*.wandb")
    assert kept.stat().st_size > 1000


def test_interrupt_from_the_keyboard_keeps_what_is_finished(
    run_dir: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = fit_arguments(run_dir, tiny_checkpoint, *EVERY_STEP)
    running = Running(arguments, tmp_path / "out.txt")
    running.wait_for((run_dir / "checkpoints" / LAST).exists)
    running.send(signal.SIGINT)
    assert running.wait(60) == 130, running.said
    assert "the same command goes on from there" in running.said
    assert is_whole(run_dir / "checkpoints" / LAST)
