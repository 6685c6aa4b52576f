"""Training checkpoints on disk in two forms that every reader takes alike.

A file, as torch writes it; or a folder to which each process of a sharded run wrote its share:

    meta.pt                              everything but shared-out tensors; a mark stands for each
    shard-00001-of-00004.safetensors     rows of these tensors, one file for each process

Neither holds anything that could run. A new checkpoint takes an older one's place when it is
finished; the older one is moved aside for that moment, and back by the next reader should the
process be killed in it.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lar_lightning.errors import SettingError

META = "meta.pt"
MARK = "__shared_out__"
"""Key of a dictionary that stands for a tensor: its name in the shards."""

Rows = Callable[[slice], Tensor]
"""Reads some rows of a tensor on disk."""
Place = Callable[[torch.Size, Rows], Tensor]
"""Makes a tensor of a shape of what it reads."""


def shard_name(rank: int, num_ranks: int) -> str:
    """Return the name of a process's file."""
    return f"shard-{rank + 1:05}-of-{num_ranks:05}.safetensors"


def split_shards(content: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Take shared-out tensors out of nested dictionaries and lists.

    Returns:
        The content with marks in their places, and this process's rows of each.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(content, DTensor):
        local = content.to_local().detach().cpu().contiguous()
        return {MARK: name, "shape": list(content.shape)}, {name: local}
    if not isinstance(content, Mapping | list | tuple):
        return content, {}
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    parts = {key: split_shards(value, f"{name}/{key}") for key, value in items}
    shards = {key: local for _, found in parts.values() for key, local in found.items()}
    if isinstance(content, Mapping):
        return {key: part for key, (part, _) in parts.items()}, shards
    return type(content)(part for part, _ in parts.values()), shards


def read_checkpoint(path: Path, place: Place | None = None) -> dict[str, Any]:
    """Read a checkpoint of either form.

    Args:
        path: File or folder.
        place: For tensors that were shared out, where not all rows are wanted.

    Raises:
        SettingError: if it is missing, or is not whole.
    """
    path = found_checkpoint(path)
    if path.is_dir():
        shards = _Shards(path)
        return shards.joined(shards.meta, place or _all_rows)
    if not path.exists():
        raise SettingError(f"`ckpt_path` must be a checkpoint, got {path}, which does not exist.")
    # Where little is wanted, only that is read.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=place is not None)


def _all_rows(shape: torch.Size, rows: Rows) -> Tensor:
    return rows(slice(0, shape[0]))


def found_checkpoint(path: Path) -> Path:
    """Put a checkpoint back that was moved aside for one which then never came; return `path`."""
    retired = _beside(path, "old")
    if retired.exists() and not path.exists():
        try:
            os.replace(retired, path)
        except FileNotFoundError:
            assert path.exists(), "another process was faster"
    return path


def pending_path(path: Path) -> Path:
    """Return where a checkpoint is written before it is finished."""
    return _beside(path, "new")


def take_place(path: Path) -> None:
    """Let the finished checkpoint at `pending_path` take the place of an older one."""
    retired, pending = _beside(path, "old"), pending_path(path)
    if path.is_file() and pending.is_file():
        os.replace(pending, path)
        remove(retired)  # of a process that was killed before it came to this
        return
    found_checkpoint(path)
    for _ in range(3):
        remove(retired)
        if path.exists():
            os.replace(path, retired)
        try:
            os.replace(pending, path)
            break
        except OSError:
            if not path.exists():  # else a reader has put the older one back meanwhile
                raise
    remove(retired)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def modified(path: Path) -> int:
    """Return when a checkpoint was written, in nanoseconds."""
    return (path / META if path.is_dir() else path).stat().st_mtime_ns


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


class _Shards:
    """The opened files of a folder."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.files: list[Any] = []
        try:
            self.meta = torch.load(folder / META, map_location="cpu", weights_only=True)
            num_ranks = int(self.meta["num_shards"])
            for rank in range(num_ranks):
                self.files.append(safe_open(folder / shard_name(rank, num_ranks), framework="pt"))
        except (OSError, RuntimeError, KeyError, EOFError, SafetensorError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SettingError(
                f"`ckpt_path` must be a whole checkpoint, got {folder}, of which a part is missing "
                f"or damaged ({reason}). Put the folder back as it was written, or remove it to "
                "train anew."
            ) from error

    def joined(self, content: Any, place: Place) -> Any:
        """Put tensors in the places of their marks."""
        if isinstance(content, Mapping) and MARK in content:
            name = content[MARK]
            return place(torch.Size(content["shape"]), lambda rows: self._rows(name, rows))
        if isinstance(content, Mapping):
            return {key: self.joined(value, place) for key, value in content.items()}
        if isinstance(content, list | tuple):
            return type(content)(self.joined(value, place) for value in content)
        return content

    def _rows(self, name: str, wanted: slice) -> Tensor:
        """Return some rows of a tensor, which lie in the files one after the other."""
        parts, start = [], 0
        for file in self.files:
            stored = file.get_slice(name)
            end = start + stored.get_shape()[0]
            low, high = (min(max(row, start), end) for row in (wanted.start, wanted.stop))
            parts.append(stored[low - start : high - start])
            start = end
        return torch.cat(parts)
