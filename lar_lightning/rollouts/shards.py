"""Shards: the parts of a rollout that several processes, such as a SLURM array, share.

A task belongs to the shard of its place in the drawn order, so that shards differ by one task at
most and asking for more tasks moves none. Each shard writes files of its own, which are read as
one; what is finished counts whoever made it, so a run may go on with another number of shards.
"""

import fcntl
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lar_lightning.artefacts import explained_disk_errors
from lar_lightning.errors import SettingError
from lar_lightning.trajectories import shard_path

MAX_COUNT = 1 << 20
LOCK_NAME = ".rollouts.lock"

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index` of `count`; of one part it is the whole."""

    index: int = 0
    count: int = 1

    @property
    def label(self) -> str:
        """What is said of it behind a name; nothing of the whole."""
        return "" if self.count == 1 else f", shard {self.index}/{self.count}"

    def part_of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return every `count`-th item, so that what is appended moves none of the others."""
        return items[self.index :: self.count]

    def path_of(self, path: Path) -> Path:
        """Return the file that this shard writes of the trajectories of `path`."""
        return path if self.count == 1 else shard_path(path, self.index, self.count)

    def owns(self, file: Path, path: Path) -> bool:
        """Tell whether nobody else can be writing to a file while this shard is at work."""
        return self.count == 1 or file == self.path_of(path)


WHOLE = Shard()


def chosen_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """Return the shard that `--shard` names.

    Args:
        text: `2/8`, `all`, or `auto`: what the environment says.
        environment: Of the process; SLURM names the tasks of an array in it.

    Raises:
        SettingError: if it names none.
    """
    if text == "auto":
        return _array_shard(environment)
    if text == "all":
        return WHOLE
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    shard = Shard(index=int(match[1]), count=int(match[2])) if match else None
    if shard is None or not 0 <= shard.index < shard.count <= MAX_COUNT:
        raise SettingError(
            f"`--shard` must be auto, all or INDEX/COUNT with an index from 0 to COUNT - 1, got "
            f"{text!r}. The last of eight parts is 7/8."
        )
    return shard


def _array_shard(environment: Mapping[str, str]) -> Shard:
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    found = [environment.get(f"SLURM_ARRAY_TASK_{name}", "") for name in names]
    if not found[0]:
        return WHOLE
    task, first, last, step, count = (int(value) if value.isdecimal() else -1 for value in found)
    is_known = min(task, first, last, count) >= 0 and step > 0
    if not is_known or (last - first) // step + 1 != count or (task - first) % step:
        given = ", ".join(f"{name} {value!r}" for name, value in zip(names, found, strict=True))
        raise SettingError(
            "`--shard auto` needs an array of even steps (`--array=0-7`), since only then do its "
            f"tasks know their place, got SLURM_ARRAY_TASK_ of {given}. Say `--shard INDEX/COUNT`."
        )
    return Shard(index=(task - first) // step, count=count)


@contextmanager
def writing(folder: Path, shard: Shard) -> Iterator[None]:
    """Hold a shard's right to write; the system takes it back however the process ends.

    One lock file holds for each number of shards a range of bytes with one byte a shard. A process
    has its own byte alone, and shares all other ranges, so that others can work on other shards of
    the same number only. Byte ranges are locked on NFS too.

    Raises:
        SettingError: if another process has the shard, or works with another number of shards.
    """
    with explained_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    start = shard.count * MAX_COUNT
    try:
        _lock(descriptor, folder, fcntl.LOCK_SH, "with another number of shards", 0, start)
        _lock(descriptor, folder, fcntl.LOCK_SH, "with another number of shards", start + MAX_COUNT)
        what = f"on shard {shard.index}/{shard.count}" if shard.count > 1 else "on all tasks"
        _lock(descriptor, folder, fcntl.LOCK_EX, what, start + shard.index, 1)
        yield
    finally:
        os.close(descriptor)


def _lock(
    descriptor: int, folder: Path, kind: int, what: str, start: int, num_bytes: int = 0
) -> None:
    """Lock a range of bytes, of 0 bytes all from its start on; `what` describes who has it."""
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB, num_bytes, start)
    except (BlockingIOError, PermissionError) as error:
        raise SettingError(
            f"`run_dir` must have one process a shard, but another one is at work {what} in "
            f"{folder}. Wait for it, or end it: what it has finished is reused."
        ) from error
    except OSError as error:
        warnings.warn(
            f"{folder}: this file system has no locks ({error.strerror}); see to it that no two "
            "processes roll out the same tasks.",
            stacklevel=4,
        )
