"""The other end of `engine_processes`: an engine that is asked over a pipe.

It ends when it is told to, and when whoever asks it is gone.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue

from lar_lightning.policies.opening import Opening
from lar_lightning.policies.policy import Completion, Policy, Request, Sampling


@dataclass(frozen=True, kw_only=True)
class Submit:
    """A request, in the round that began with the last abort."""

    round: int
    request: Request
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class Abort:
    """Forget all requests; those to come belong to this round."""

    round: int


@dataclass(frozen=True)
class Close:
    """End."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The engine is open."""

    entropy_kind: str


@dataclass(frozen=True, kw_only=True)
class Done:
    """What became finished, of a round."""

    round: int
    completions: list[Completion]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The engine did not open, or broke; its process ends."""

    reason: str


Asked = Submit | Abort | Close
Answered = Ready | Done | Failed


def serve(connection: Connection, opening: Opening, cores: tuple[int, ...]) -> None:
    """Open an engine and answer until told to end: the target of a process.

    Args:
        connection: To whoever asks.
        opening: Of the engine.
        cores: That its threads may use; none: all.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; who asks decides
    if cores:
        os.sched_setaffinity(0, cores)
    asked: SimpleQueue[Asked] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, asked), daemon=True).start()
    try:
        with opening.open_here() as policy:
            connection.send(Ready(entropy_kind=policy.entropy_kind))
            _answer(connection, policy, asked)
    except BaseException as error:
        with suppress(OSError):
            words = " ".join(str(error).split())
            connection.send(Failed(reason=f"{type(error).__name__}: {words}"[:500]))
        raise SystemExit(1) from error


def _receive(connection: Connection, asked: "SimpleQueue[Asked]") -> None:
    """Take in what is asked while the engine is at work, so that asking never waits."""
    try:
        while True:
            asked.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)  # nobody is left to answer; the engine may be at work or still loading


def _answer(connection: Connection, policy: Policy, asked: "SimpleQueue[Asked]") -> None:
    unfinished, current = 0, 0
    while True:
        for message in _pending(asked, is_idle=unfinished == 0):
            match message:
                case Submit():
                    policy.submit(message.request, message.sampling)
                    unfinished += 1
                case Abort():
                    policy.abort()
                    unfinished, current = 0, message.round
                case Close():
                    return
        completions = policy.step() if unfinished else []
        if completions:
            unfinished -= len(completions)
            connection.send(Done(round=current, completions=completions))


def _pending(asked: "SimpleQueue[Asked]", *, is_idle: bool) -> Iterator[Asked]:
    """Yield what has been asked; with nothing else to do, wait for the first."""
    if is_idle:
        yield asked.get()
    with suppress(Empty):
        while True:
            yield asked.get_nowait()
