"""Training checkpoints on disk in two forms that every reader takes alike.

A file, as torch writes it; or a folder to which each process of a sharded run wrote its share:

    meta.pt                              everything but shared-out tensors; a mark stands for each
    shard-00001-of-00004.safetensors     rows of these tensors, one file for each process

Neither holds anything that could run. A new checkpoint is written beside the last as `next.ckpt`;
when it is whole, the last becomes `previous.ckpt` and the new one the last. Whatever moment a
process is killed at, and should the last be torn, one of the three is whole, and `newest_whole`
finds it.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lar_lightning.artefacts import differences
from lar_lightning.errors import SettingError

LAST = "last.ckpt"
"""The checkpoint that a run goes on from."""
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
    if path.is_dir():
        shards = _Shards(path)
        return shards.joined(shards.meta, place or _all_rows)
    if not path.exists():
        raise SettingError(f"`ckpt_path` must be a checkpoint, got {path}, which does not exist.")
    # Where little is wanted, only that is read.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=place is not None)


def _all_rows(shape: torch.Size, rows: Rows) -> Tensor:
    return rows(slice(0, shape[0]))


def newest_whole(path: Path) -> Path | None:
    """Return the checkpoint that a run goes on from: the one at `path`, or a whole one beside it.

    Raises:
        SettingError: if there are checkpoints, and none is whole.
    """
    found = [each for each in (path, next_path(path), previous_path(path)) if each.exists()]
    whole = next((each for each in found if is_whole(each)), None)
    if found and whole is None:
        raise SettingError(
            "a run must go on from a whole checkpoint, got only torn ones, of which a part is "
            f"missing or damaged: {', '.join(map(str, found))}. Put them back as they were "
            "written, or remove them to train anew; trajectories and latent actions are kept."
        )
    return whole


def is_whole(path: Path) -> bool:
    """Tell whether a checkpoint is there, and was written to its end; no tensor is read.

    The directory of a PyTorch file stands at its end, and the header of a safetensors file says
    how long it is.
    """
    if path.is_dir():
        shards = sorted(path.glob("shard-*.safetensors"))
        num_shards = int(shards[0].stem.rpartition("-")[2]) if shards else 0
        wanted = [path / shard_name(rank, num_shards) for rank in range(num_shards)]
        return (
            bool(shards)
            and shards == wanted
            and all(map(_is_long, shards))
            and is_whole(path / META)
        )
    try:
        with zipfile.ZipFile(path) as file:
            return bool(file.namelist())
    except (FileNotFoundError, zipfile.BadZipFile):
        return False


def _is_long(path: Path) -> bool:
    """Tell whether a safetensors file has all the bytes that its header tells of."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, path.stat().st_size)))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry]
    return path.stat().st_size == 8 + length + max(ends, default=0)


def next_path(path: Path) -> Path:
    """Return where a checkpoint is written before it is finished."""
    return path.with_name("next.ckpt" if path.name == LAST else f".next-{path.name}")


def previous_path(path: Path) -> Path:
    """Return where the checkpoint before the last is kept."""
    return path.with_name("previous.ckpt" if path.name == LAST else f".previous-{path.name}")


def take_place(path: Path) -> None:
    """Make the finished checkpoint at `next_path` the one at `path`, and that the previous one.

    Raises:
        SettingError: if it is torn; the others stay what they were.
    """
    written, previous = next_path(path), previous_path(path)
    if not is_whole(written):
        raise SettingError(
            f"a checkpoint must be written whole, got a torn {written}. Free space or choose "
            "another `run_dir`; the one before is kept."
        )
    _reach_disk(written)
    if is_whole(path):
        remove(previous)
        os.replace(path, previous)
    else:  # the previous one is better than it
        remove(path)
    os.replace(written, path)
    if path.name != LAST:  # of a run's other checkpoints one of each is enough
        remove(previous)


def _reach_disk(checkpoint: Path) -> None:
    """Have contents on disk before a name points to them, should the machine lose power."""
    files = [checkpoint] if checkpoint.is_file() else [*checkpoint.iterdir()]
    for path in (*files, checkpoint.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def modified(path: Path) -> int:
    """Return when a checkpoint was written, in nanoseconds."""
    return (path / META if path.is_dir() else path).stat().st_mtime_ns


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


def check_checkpoint(
    checkpoint: dict[str, Any], identity: dict[str, str], settings: dict[str, Any]
) -> None:
    """Refuse a checkpoint of another base model, vocabulary or setting.

    Raises:
        SettingError: naming what differs.
    """
    stored = checkpoint.get("latent_actions")
    if stored is None:
        raise SettingError(
            "`ckpt_path` must be a checkpoint of this trainer, got one without latent actions."
        )
    changed = differences(stored["identity"], identity)
    if changed:
        raise SettingError(
            "the checkpoint must belong to this base model and latent vocabulary, got one of "
            f"others ({changed}). "
            "Restore them, or choose another `run_dir`."
        )
    changed = differences(stored["settings"], settings)
    if changed:
        raise SettingError(
            f"a run must go on with the settings that it began with, got others ({changed}). "
            "Choose another `run_dir`, or remove the run's checkpoints to train anew."
        )
