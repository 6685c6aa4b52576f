"""Files that a stage leaves for the next one.

Written whole or not at all, and signed with what made them.
"""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lar_lightning.errors import SettingError

Settings = Mapping[str, Any]
"""JSON-able settings that decide what an artefact contains; equal settings mean that it can be
reused."""


def differences(stored: Settings, wanted: Settings) -> str:
    """Describe how two settings differ, as `key: stored -> wanted`, or return an empty string."""
    keys = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    return ", ".join(f"{key}: {stored.get(key)!r} -> {wanted.get(key)!r}" for key in keys)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file name beside `path` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained_disk_errors(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with explained_disk_errors(path):
            yield temporary
            temporary.chmod(0o755)  # mkdtemp makes it private; a served checkpoint must be readable
            if path.exists():
                retired = temporary.with_suffix(".old")
                os.replace(path, retired)
                os.replace(temporary, path)
                shutil.rmtree(retired)
            else:
                os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process makes what is to be at `path`; look again whether it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # the system lets go of it however the process ends
        yield


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def write_text(path: Path, content: str) -> None:
    """Write `content`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


@contextmanager
def explained_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a `SettingError` that names the place."""
    try:
        yield
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        raise SettingError(
            f"`run_dir` must be a place with room that can be written to, got {path} ({reason}). "
            "Free space or choose another `run_dir`; what was finished before is kept."
        ) from error


def disk_error(error: BaseException) -> str | None:
    """Return why a disk did not take what was written, or None for any other error."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in codes:
        return os.strerror(error.errno)
    # Writers in other languages (safetensors, torch) have errors of their own for it.
    no_space = os.strerror(errno.ENOSPC)
    return no_space if no_space.lower() in str(error).lower() else None
