"""Programs that a verb runs and waits for."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType


def run_program(command: Sequence[str]) -> int:
    """Run a program to its end and return its exit status.

    SIGTERM is passed on and the program waited for, since it may have a checkpoint to write and
    holds the lock of its run: without that it would train on by itself. Ctrl-C reaches both from
    the terminal. Call it from the main thread.

    Raises:
        SystemExit: with SIGTERM's status, once the program has ended, if SIGTERM came.
    """
    stopped: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        process.send_signal(number)

    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped:
        print("stopped by SIGTERM: the same command goes on from here", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)
    return status
