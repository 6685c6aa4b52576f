"""Programs that a verb runs and waits for."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType


def run_program(command: Sequence[str]) -> int:
    """Run a program to its end and return its exit status.

    However this process is told to stop, the program is waited for: it may have a checkpoint to
    write, and it holds the lock of its run. SIGTERM is passed on to it; Ctrl-C reaches both from
    the terminal. Call it from the main thread.

    Raises:
        SystemExit: with SIGTERM's status, once the program has ended, if SIGTERM came.
        KeyboardInterrupt: once the program has ended, if Ctrl-C came; a second one is not waited
            for.
    """
    is_stopped = False
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopped
        is_stopped = True
        if process is not None:
            process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        process = subprocess.Popen(command)
        if is_stopped:  # while it was being started
            process.terminate()
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if is_stopped:
        print("stopped by SIGTERM: the same command goes on from here", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)
    return status
