"""Verbs in processes of their own, for faults that end a process.

A server imports what training needs once; each process is a fork of it, and starts at once.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from lar_lightning.__main__ import main

PRELOADED = ["tests.processes", "lar_lightning.cli", "data_modules", "callbacks", "peft"]
PRELOADED += ["transformers.models.llama.modeling_llama", "lar_lightning.mining"]
SECONDS = 300.0
"""After which a process is given up."""

context: ForkServerContext = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)


class Running:
    """A verb at work in a process."""

    def __init__(
        self,
        arguments: Sequence[str],
        output: Path,
        *,
        prepare: Callable[..., None] | None = None,
        options: Sequence[Any] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            arguments: Of the command line.
            output: File for what it prints.
            prepare: Called in the process before the verb, to break something; a function of a
                module's own.
            options: Of `prepare`.
            environment: Variables for the process.
        """
        self.output = output
        self.process: ForkServerProcess = context.Process(
            target=_run,
            args=(list(arguments), output, prepare, tuple(options), dict(environment or {})),
        )
        self.process.start()
        assert self.process.pid
        self.pid: int = self.process.pid

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = SECONDS) -> int | None:
        """Return its exit status, negative for a signal; kill it and return None if it hangs."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            return None
        return self.process.exitcode

    def wait_for(self, condition: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Wait until something holds while it is at work."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.005)


def _run(
    arguments: list[str],
    output: Path,
    prepare: Callable[..., None] | None,
    options: Sequence[Any],
    environment: dict[str, str],
) -> None:
    import torch

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]  # what tests in the parent have left, its service among them
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if "RANK" in environment:  # read when it was imported
        import lightning.fabric.utilities.rank_zero as lightning_ranks

        lightning_ranks.rank_zero_only.rank = int(environment["RANK"])  # type: ignore[attr-defined]
    if prepare is not None:
        prepare(*options)
    sys.argv = ["lar_lightning", *arguments]
    status = main(arguments)
    sys.stdout.flush()
    sys.exit(status)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(
    arguments: Sequence[str],
    folder: Path,
    *,
    prepare: Callable[..., None] | None = None,
    options: Sequence[Any] = (),
) -> list[Running]:
    """Start both processes of a run of two, as a launcher such as torchrun does."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    return [
        Running(
            [*arguments, *both],
            folder / f"rank-{rank}.txt",
            prepare=prepare,
            options=options,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"},
        )
        for rank in range(2)
    ]
