"""A program that a verb waits for: its status, and what becomes of it when the verb is stopped."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from lar_lightning.agents.subprograms import run_program

CAREFUL = """
import signal, sys, time
from pathlib import Path

def save(*_):
    time.sleep(0.5)
    Path("saved").touch()
    sys.exit(3)

signal.signal(signal.SIGTERM, save)
Path("ready").touch()
time.sleep(60)
"""
"""Saves before it ends, as `fit` does."""


def test_the_status_of_a_program_comes_back() -> None:
    assert run_program([sys.executable, "-c", "raise SystemExit(7)"]) == 7


def test_sigterm_stops_the_program_and_lets_it_save_first(tmp_path: Path) -> None:
    code = (
        "import sys; from lar_lightning.agents.subprograms import run_program;"
        "run_program([sys.executable, 'careful.py']); print('went on')"
    )
    (tmp_path / "careful.py").write_text(CAREFUL)
    verb = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    verb.send_signal(signal.SIGTERM)
    said = verb.communicate(timeout=60)
    assert (tmp_path / "saved").exists()
    assert verb.returncode == 128 + signal.SIGTERM
    assert said == ("", "stopped by SIGTERM: the same command goes on from here\n")
