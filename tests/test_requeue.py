"""Runs that a signal stops, without SLURM: what is saved, said, and how they go on."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from slurm_cluster import wait_for
from whole_runs import TEN_STEPS, checkpoint_of, fit_arguments, metrics_of

from lar_lightning.__main__ import main
from lar_lightning.module import LatentActionModule

OVERLAY = ("--config", "configs/slurm/slurm.yaml")
SPARSE = (
    *TEN_STEPS,
    "--trainer.max_steps=12",
    "--trainer.log_every_n_steps=1",
    "--checkpoint.every_n_train_steps=100",
    "--data.init_args.loading.batch_size=32",  # five batches are an epoch
    *OVERLAY,
)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A run that a signal ends keeps its handlers: its process would end, too."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def fit_with_a_signal(
    place: str,
    step: int,
    number: signal.Signals,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> int:
    """Fit, send the own process a signal in one call of the module, and return the exit status."""
    call = getattr(LatentActionModule, place)

    def signalling(self: LatentActionModule, batch: object, batch_idx: int) -> object:
        if self.global_step == step and not self.trainer.sanity_checking:
            os.kill(os.getpid(), number)
        return call(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LatentActionModule, place, signalling)
        with pytest.raises(SystemExit) as ended:
            main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def undisturbed(
    rolled_out: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = Path(shutil.copytree(rolled_out, tmp_path_factory.mktemp("undisturbed") / "run"))
    assert main(fit_arguments(folder, tiny_checkpoint, *SPARSE)) == 0
    return folder


@pytest.mark.parametrize(
    ("place", "step", "number"),
    [
        ("training_step", 2, signal.SIGUSR1),
        ("training_step", 4, signal.SIGUSR1),  # a validation is due next, which must not be lost
        ("validation_step", 5, signal.SIGTERM),
        ("training_step", 7, signal.SIGTERM),
    ],
)
def test_signal_saves_the_run_at_the_end_of_the_batch_and_it_goes_on_exactly(
    place: str,
    step: int,
    number: signal.Signals,
    run_dir: Path,
    undisturbed: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    arguments = fit_arguments(run_dir, tiny_checkpoint, *SPARSE)
    assert fit_with_a_signal(place, step, number, arguments, monkeypatch) == 128 + number
    num_steps = step + (place == "training_step")
    assert checkpoint_of(run_dir)["global_step"] == num_steps
    said = f"requeue: {number.name}: saved {run_dir / 'checkpoints' / 'last.ckpt'} after step"
    assert f"{said} {num_steps}; the same command goes on from there" in capsys.readouterr().out
    assert main(arguments) == 0
    resumed, whole = checkpoint_of(run_dir)["state_dict"], checkpoint_of(undisturbed)["state_dict"]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    for metric, count in (("train/loss_nats", 12), ("val/loss_nats", 3)):
        assert metrics_of(run_dir, metric) == metrics_of(undisturbed, metric)
        assert len(metrics_of(run_dir, metric)) == count


def started_fit(run_dir: Path, checkpoint: Path, *options: str) -> subprocess.Popen[str]:
    arguments = fit_arguments(run_dir, checkpoint, *SPARSE, *options)
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "lar_lightning", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def is_holding(process: int) -> bool:
    """Return whether a process holds SIGTERM back."""
    status = Path(f"/proc/{process}/status").read_text()
    held = int(status.partition("SigBlk:\t")[2].partition("\n")[0], 16)
    return bool(held >> (signal.SIGTERM - 1) & 1)


def test_signal_during_imports_waits_for_who_listens(run_dir: Path, tiny_checkpoint: Path) -> None:
    process = started_fit(run_dir, tiny_checkpoint)
    wait_for(lambda: is_holding(process.pid), "the program", 60)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "requeue: SIGTERM: training had not begun, what is finished is kept" in output
    assert not (run_dir / "checkpoints").exists()


def test_two_processes_stop_together_when_one_gets_the_signal(
    run_dir: Path, tiny_checkpoint: Path
) -> None:
    two = ("--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp")
    options = (*two, "--trainer.max_steps=100000", "--checkpoint.every_n_train_steps=1")
    process = started_fit(run_dir, tiny_checkpoint, *options, "--trainer.limit_val_batches=0")
    last = run_dir / "checkpoints" / "last.ckpt"
    wait_for(lambda: last.exists() or process.poll() is not None, "training", 300)
    (child,) = children_of(process.pid)
    os.kill(child, signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert output.count("requeue: SIGTERM: saved") == 1
    assert checkpoint_of(run_dir)["global_step"] > 0
    wait_for(lambda: not Path(f"/proc/{child}").exists(), "the second process to end", 20)


def children_of(process: int) -> list[int]:
    """Return the processes that run our program and that a process has started."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [
        int(child)
        for child in found
        if b"lar_lightning" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
