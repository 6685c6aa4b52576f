"""A run's checkpoints: the last, and the one before it, so that a torn one never loses the run.

A checkpoint is written beside the last as `next.ckpt`; when it is whole, the last becomes
`previous.ckpt` and the new one the last. Whatever moment a process is killed at, one of the three
is whole, and `newest_whole` finds it. A checkpoint is a file, or a folder of shards.
"""

import os
import shutil
import zipfile
from pathlib import Path

from lar_lightning.errors import SettingError

LAST, NEXT, PREVIOUS = "last.ckpt", "next.ckpt", "previous.ckpt"
SHARD_INDEX, RUN_STATE = ".metadata", "meta.pt"
"""What a folder of shards holds when all ranks have written: written last, in this order."""


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is there, and was written to its end.

    The directory of a PyTorch file stands at its end and names the place of each tensor.
    """
    if checkpoint.is_dir():
        has_index = (checkpoint / SHARD_INDEX).is_file()
        return has_index and is_whole(checkpoint / RUN_STATE)
    try:
        with zipfile.ZipFile(checkpoint) as file:
            return bool(file.namelist())
    except (FileNotFoundError, zipfile.BadZipFile):
        return False


def newest_whole(last: Path) -> Path | None:
    """Return the checkpoint that a run goes on from: `last`, or a whole one beside it.

    Raises:
        SettingError: if there are checkpoints, and none is whole.
    """
    candidates = [last, last.with_name(NEXT), last.with_name(PREVIOUS)]
    found = [path for path in candidates if path.exists()]
    whole = next((path for path in found if is_whole(path)), None)
    if found and whole is None:
        raise SettingError(
            "a run must go on from a whole checkpoint, got only torn ones: "
            f"{', '.join(map(str, found))}. Remove them to train anew; trajectories and "
            "latent actions are kept."
        )
    return whole


def put_in_place(last: Path) -> None:
    """Make what was written as `next.ckpt` the last checkpoint, and the last the previous.

    Raises:
        SettingError: if it is torn; the last stays what it was.
    """
    written = last.with_name(NEXT)
    if not is_whole(written):
        raise SettingError(
            f"a checkpoint must be written whole, got a torn {written}. Free space or choose "
            f"another `run_dir`; {last.name} is kept."
        )
    _reach_disk(written)
    if is_whole(last):
        previous = last.with_name(PREVIOUS)
        remove(previous)
        os.replace(last, previous)
    else:  # the previous one is better than it
        remove(last)
    os.replace(written, last)


def remove(checkpoint: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def _reach_disk(checkpoint: Path) -> None:
    """Have contents on disk before a name points to them, should the machine lose power."""
    files = [checkpoint] if checkpoint.is_file() else [*checkpoint.rglob("*")]
    for path in (*files, checkpoint.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
