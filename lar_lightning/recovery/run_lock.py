"""One `fit` at a time in a run folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lar_lightning.artefacts import explained_disk_errors
from lar_lightning.errors import SettingError

LOCK_NAME = ".fit.lock"


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a run folder; the system lets go of it however the process ends.

    The lock is POSIX's, which network file systems know and forked processes do not inherit.

    Raises:
        SettingError: naming the process that holds it.
    """
    path = run_dir / LOCK_NAME
    with explained_disk_errors(path):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise SettingError(
                f"`run_dir` must not be in use by another `fit`, but {run_dir} is, by "
                f"{file.read().strip() or 'one that has just begun'}. Wait for it, end it, or "
                "choose another `run_dir`."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def is_first_process() -> bool:
    """Tell whether this is the one process of a run that writes, from what its launcher has set."""
    of_node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    rank = next((rank for rank in ranks if rank is not None), "0")
    return int(rank) == 0 and int(of_node) == 0
