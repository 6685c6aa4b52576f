"""Stopping in time on a cluster, and asking it for another turn.

SLURM says that time is nearly up by a signal: SIGUSR1 where the job script asks for it, SIGTERM
before it kills. A `Listener` notes them; `leave` asks SLURM to start the job again, unless that is
of no use, and says which. What a training run saves first is the caller's business.
"""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lar_lightning.artefacts import write_json

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
SCONTROL_SECONDS = 20
"""Longest wait for an answer; a job has less than a minute where it got SIGTERM alone."""
NUM_TRIES = 3
"""A controller that is being restarted refuses for a moment."""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """The job that this process belongs to."""

    job_id: str
    """As `scontrol` takes it: of an array, this task alone."""
    num_restarts: int
    """How often it was requeued before."""
    is_first_process: bool
    """Of all its processes: the one that speaks with SLURM."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "SlurmJob | None":
        """Return the job that an environment tells of, or None outside SLURM."""
        if "SLURM_JOB_ID" not in environment:
            return None
        job_id = environment["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in environment:
            job_id = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
        return cls(
            job_id=job_id,
            num_restarts=int(environment.get("SLURM_RESTART_COUNT", 0)),
            is_first_process=environment.get("SLURM_PROCID", "0") == "0",
        )


@contextmanager
def held_signals() -> Iterator[None]:
    """Hold signals back while nobody listens, for instance while packages are imported.

    They arrive at the end, or at `release_signals`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        release_signals()


def release_signals() -> None:
    """Let signals in, those first that were held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class Listener:
    """Notes signals, or acts on them at once where nothing is half-written."""

    noted: int = 0
    """Number of the signal, the higher of several; 0 without one."""

    def __init__(self, at_once: Callable[[int], None]) -> None:
        """Begin to listen, and act at once until told otherwise.

        Args:
            at_once: Called inside the handler, with the number of the signal.
        """
        self.at_once: Callable[[int], None] | None = at_once
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()

    def listen(self) -> None:
        """Take the signals over, again where somebody else has taken them."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def only_note(self) -> None:
        """Act on no signal any more: the caller looks at `noted`."""
        self.at_once = None

    def close(self) -> None:
        """Give the signals back."""
        self.at_once = None
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.noted = max(self.noted, number)
        if self.at_once is not None:
            self.at_once(number)


def leave(job: SlurmJob | None, run_dir: Path, number: int, saved: str, max_idle: int) -> int:
    """Ask for another turn where that is of use, say what happened, and return the exit status.

    Called in one process of a run, after everything is saved.

    Args:
        job: None outside SLURM, where a run just stops.
        run_dir: Folder of the run.
        number: Of the signal.
        saved: What is on disk, for the line that is printed.
        max_idle: Turns in a row that may bring nothing.

    Returns:
        0 where the job goes on in another turn or was cancelled, else 128 and the signal.
    """
    name = signal.Signals(number).name
    status, outcome = 128 + number, "the same command goes on from there"
    if job is not None:
        status, outcome = _outcome(job, run_dir, number, max_idle)
    print(f"requeue: {name}: {saved}; {outcome}", flush=True)
    return status


def _outcome(job: SlurmJob, run_dir: Path, number: int, max_idle: int) -> tuple[int, str]:
    failed = 128 + number
    state = job_state(job)
    if int(state.get("Restarts", 0)) > job.num_restarts:
        return 0, f"SLURM has requeued job {job.job_id} by itself"
    # A job that was cancelled must not come back; SIGTERM is also what a time limit sends.
    is_over = state.get("JobState", "RUNNING") != "RUNNING" and state.get("Reason") != "TimeLimit"
    if number == signal.SIGTERM and is_over:
        return 0, f"job {job.job_id} was cancelled, so it is not requeued"
    num_idle = count_idle_turns(run_dir, job)
    if num_idle >= max_idle:
        return failed, (
            f"job {job.job_id} is not requeued: its last {num_idle} turns made no training step "
            "and nothing else that is kept. Give it a longer --time"
        )
    reason = requeue(job)
    if reason is not None:
        return failed, (
            f"job {job.job_id} could not be requeued ({reason}). Submit it again: it goes on from "
            "there"
        )
    return 0, f"job {job.job_id} is requeued, for the turn {job.num_restarts + 2}"


def job_state(job: SlurmJob) -> dict[str, str]:
    """Return what SLURM says of a job; nothing where it does not answer."""
    try:
        said = _scontrol("show", "job", "-o", job.job_id)
    except (OSError, subprocess.SubprocessError):
        return {}
    parts = [part.partition("=") for part in said.partition("\n")[0].split()]
    return {key: value for key, equals, value in parts if equals}


def requeue(job: SlurmJob) -> str | None:
    """Put a job back into the queue; return why that failed, or None."""
    reason = None
    for attempt in range(NUM_TRIES):
        if attempt:
            time.sleep(2)
        try:
            _scontrol("requeue", job.job_id)
        except FileNotFoundError:
            return "the command scontrol is not found"
        except subprocess.CalledProcessError as error:
            reason = " ".join((error.stderr or error.stdout).split()) or str(error)
        except (OSError, subprocess.SubprocessError) as error:
            reason = str(error)
        else:
            return None
    return reason


def _scontrol(*arguments: str) -> str:
    result = subprocess.run(
        ["scontrol", *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=SCONTROL_SECONDS,
    )
    return result.stdout


def turns_path(run_dir: Path) -> Path:
    """Return where a run notes what the turns of its job have brought."""
    return run_dir / "slurm" / "turns.json"


def count_idle_turns(run_dir: Path, job: SlurmJob) -> int:
    """Return how many turns of a job in a row, this one included, have brought nothing.

    What is there now is noted for the next turn. The first turn of a job has nothing to be
    compared with, and counts as one that brought something.
    """
    path = turns_path(run_dir)
    there = kept_work(run_dir)
    before: dict[str, Any] = {}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
    is_idle = before.get("job") == job.job_id and before["kept_work"] == there
    num_idle = before["num_idle"] + 1 if is_idle else 0
    write_json(path, {"job": job.job_id, "kept_work": there, "num_idle": num_idle})
    return num_idle


def kept_work(run_dir: Path) -> dict[str, int]:
    """Return a mark of everything by which a later turn has less to do."""
    saved = {path.name: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").glob("last*")}
    grown = [run_dir / "latent_vocabulary.json", *sorted((run_dir / "trajectories").rglob("*"))]
    sizes = {str(path.relative_to(run_dir)): path.stat().st_size for path in grown if path.exists()}
    return {**saved, **sizes}


def validation_to_repeat(checkpoint: dict[str, Any]) -> None:
    """Mark the validation in which a checkpoint is saved as one to run again from its start.

    Lightning knows the mark: a batch was begun and not ended.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    num_done = progress["total"]["completed"]
    begun = {"ready": num_done + 1, "started": num_done + 1}
    progress["total"].update(begun, processed=num_done, completed=num_done)
    progress["current"].update(ready=0, started=0, processed=0, completed=0)
