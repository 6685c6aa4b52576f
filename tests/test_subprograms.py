"""A program that a verb waits for: its status, and what becomes of it when the verb is stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lar_lightning.agents.subprograms import run_program

CAREFUL = """
import signal, sys, time
from pathlib import Path

def save(*_):
    time.sleep(1)
    Path("saved").touch()
    sys.exit(3)

signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
Path("ready").touch()
time.sleep(60)
"""
"""Saves before it ends, as `fit` does."""
VERB = """
import sys
from lar_lightning.agents.subprograms import run_program
run_program([sys.executable, 'careful.py'])
print('went on')
"""


def test_the_status_of_a_program_comes_back() -> None:
    assert run_program([sys.executable, "-c", "raise SystemExit(7)"]) == 7


def test_signals_are_as_they_were_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_program([sys.executable, "-c", ""])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_is_stopped_lets_the_program_save_first(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "careful.py").write_text(CAREFUL)
    verb = subprocess.Popen(
        [sys.executable, "-c", VERB],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # As a terminal has it; a shell's background job, with these tests in it, ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number == signal.SIGTERM:
        verb.send_signal(number)  # to the verb alone, as a scheduler does
    else:
        os.killpg(verb.pid, number)  # to all, as a terminal does
    verb.wait(timeout=60)
    assert (tmp_path / "saved").exists()
    said, complaint = verb.communicate()
    assert said == ""
    if number == signal.SIGTERM:
        assert verb.returncode == 128 + number
        assert complaint == "stopped by SIGTERM: the same command goes on from here\n"
    else:
        assert verb.returncode == -number
