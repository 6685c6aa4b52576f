"""Several engines as one policy: each in a process and on devices of its own.

Requests go to the engine with the least to do. They bring their own seeds, so which engine answers
changes a result by no more than the rounding of another batch. An engine that dies, or does not
start, leaves what it had not finished to the others; where none is left, the run ends with the
reason.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from lar_lightning.errors import EngineFailure, SettingError
from lar_lightning.policies.engine_server import Abort, Close, Done, Failed, Ready, Submit, serve
from lar_lightning.policies.opening import Opening
from lar_lightning.policies.policy import Completion, Request, Sampling
from lar_lightning.settings import ParallelSettings

STEP_SECONDS = 0.02
"""Longest wait of a step; environments are looked after between steps."""
CLOSE_SECONDS = 15.0
"""That engines have to free what they hold before their processes are killed."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
"""Of a training process among several, which an engine in a process of its own is none of."""


@dataclass(kw_only=True, eq=False)
class _Engine:
    number: int
    process: BaseProcess
    connection: Connection
    entropy_kind: str = ""
    unfinished: dict[str, tuple[Request, Sampling]] = field(default_factory=dict)
    reason: str = ""
    """Why it failed, in its own words."""

    @property
    def is_ready(self) -> bool:
        return bool(self.entropy_kind)

    def why(self) -> str:
        """Say why it is gone."""
        self.process.join(1)
        code = self.process.exitcode
        if self.reason or code is None:
            return self.reason or "it no longer answers"
        if code >= 0:
            return f"its process ended with status {code}"
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + (
            ", as the system does where memory runs out" if name == "SIGKILL" else ""
        )


class EngineProcesses:
    """The engines that are open; see `Policy`."""

    def __init__(self, engines: list[_Engine]) -> None:
        """Wait until all have started or failed.

        Raises:
            EngineFailure: if none has started.
        """
        self.num_engines = len(engines)
        self.living = engines
        self._round = 0
        while not all(engine.is_ready for engine in self.living):
            self._hear(timeout=None)
        self.entropy_kind = self.living[0].entropy_kind

    @property
    def process_ids(self) -> list[int]:
        """Those of the living engines."""
        return [engine.process.pid or 0 for engine in self.living]

    def submit(self, request: Request, sampling: Sampling) -> None:
        """Give a request to the engine with the least to do."""
        engine = min(self.living, key=lambda engine: len(engine.unfinished))
        engine.unfinished[request.request_id] = (request, sampling)
        with suppress(OSError):  # it has just died, which the next step finds out
            engine.connection.send(Submit(round=self._round, request=request, sampling=sampling))

    def step(self) -> list[Completion]:
        """Wait a moment for what the engines finish."""
        if not any(engine.unfinished for engine in self.living):
            return []
        return self._hear(timeout=STEP_SECONDS)

    def abort(self) -> None:
        """Have all engines forget what they have not finished."""
        self._round += 1  # what is on its way belongs to the round before
        for engine in self.living:
            engine.unfinished.clear()
            with suppress(OSError):
                engine.connection.send(Abort(round=self._round))

    def _hear(self, timeout: float | None) -> list[Completion]:
        by_source: dict[Any, _Engine] = {}
        for engine in self.living:
            by_source[engine.connection] = by_source[engine.process.sentinel] = engine
        heard = [by_source[source] for source in wait(list(by_source), timeout)]
        found: list[Completion] = []
        for engine in dict.fromkeys(heard):
            is_alive = engine.process.is_alive()
            # What it said before its end still counts.
            if not self._listen(engine, found) or not is_alive:
                self._bury(engine)
        return found

    def _listen(self, engine: _Engine, found: list[Completion]) -> bool:
        """Take in what an engine has said; tell whether it can say more."""
        try:
            while engine.connection.poll():
                match engine.connection.recv():
                    case Ready(entropy_kind=kind):
                        engine.entropy_kind = kind
                    case Done(round=self._round, completions=completions):
                        for completion in completions:
                            del engine.unfinished[completion.request_id]
                        found.extend(completions)
                    case Failed(reason=reason):
                        engine.reason = reason
                        return False
        except (EOFError, OSError):
            return False
        return True

    def _bury(self, engine: _Engine) -> None:
        self.living.remove(engine)
        what = "died" if engine.is_ready else "did not start"
        name = f"engine {engine.number + 1} of {self.num_engines}"
        reason = engine.why()
        _end(engine)
        if not self.living:
            raise EngineFailure(
                f"an engine must live through the run, but {name}, the last one, {what} ({reason})."
                " What was finished is kept: the same command goes on from there, with a smaller "
                "`num_concurrent` or `max_model_len` if memory ran out."
            )
        print(
            f"{name} {what} ({reason}); {len(engine.unfinished)} requests that it had go to the "
            f"other {len(self.living)}",
            file=sys.stderr,
            flush=True,
        )
        for request, sampling in engine.unfinished.values():
            self.submit(request, sampling)


def has_process_group() -> bool:
    """Tell whether this process is one of several that train."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    return bool(distributed and distributed.is_available() and distributed.is_initialized())


def check_devices(parallel: ParallelSettings) -> None:
    """Refuse more devices than this machine has.

    Raises:
        SettingError: if there are too few; without any, engines share the processor's cores.
    """
    size = parallel.tensor_parallel_size * parallel.data_parallel_size
    if size == 1 or parallel.distributed_executor_backend == "ray":
        return
    num_devices = len(_visible_devices())
    if num_devices and size > num_devices:
        raise SettingError(
            "`tensor_parallel_size` x `data_parallel_size` must be at most the number of visible "
            f"devices, got {parallel.tensor_parallel_size} x {parallel.data_parallel_size} for "
            f"{num_devices}. Lower one of them, or ask for more devices."
        )


def _visible_devices() -> list[str]:
    """Return the names of this process's accelerators as CUDA_VISIBLE_DEVICES has them."""
    import torch

    num_devices = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(number) for number in range(num_devices)]
    return names[:num_devices]


@contextmanager
def open_engine_processes(opening: Opening) -> Iterator[EngineProcesses]:
    """Start the engines of an opening, each in a process, and end them afterwards."""
    import torch

    num_engines = opening.parallel.data_parallel_size
    devices, size = _visible_devices(), opening.parallel.tensor_parallel_size
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    num_cores = len(cores) // num_engines if not devices else 0
    own = replace(
        opening,
        num_concurrent=-(-opening.num_concurrent // num_engines),
        parallel=replace(opening.parallel, data_parallel_size=1),
    )
    context = multiprocessing.get_context("spawn")
    engines: list[_Engine] = []
    try:
        for number in range(num_engines):
            environment = {
                "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // num_engines)),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # it is in a process of its own already
            }
            if devices and num_engines > 1:
                part = devices[number * size : (number + 1) * size]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(part)
            part_of_cores = tuple(cores[number * num_cores : (number + 1) * num_cores])
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(theirs, own, part_of_cores), name=f"engine {number}"
            )
            with _environment(environment):
                process.start()
            theirs.close()
            engines.append(_Engine(number=number, process=process, connection=ours))
        yield EngineProcesses(list(engines))
    finally:
        for engine in engines:
            with suppress(OSError):
                engine.connection.send(Close())
        for engine in engines:
            engine.process.join(CLOSE_SECONDS if sys.exc_info()[0] is None else 1)
            _end(engine)


def _end(engine: _Engine) -> None:
    if engine.process.is_alive():
        engine.process.kill()
        engine.process.join()
    engine.connection.close()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have a process that is started see other variables, and none that make it a rank."""
    before = {name: os.environ.pop(name, None) for name in (*variables, *RANK_VARIABLES)}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
