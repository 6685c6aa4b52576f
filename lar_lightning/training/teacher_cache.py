"""Hidden states of the frozen teacher on disk, where the loss reads them.

Teacher and trajectories are fixed, so each trajectory needs the teacher once, for all epochs and
all runs in a folder. An entry is found by its content: base tokens and the positions that are read.
What is computed is written before it is used, in the teacher's own precision: a run that is killed
and resumed reads the very values that it would have had.

Dimensions: B trajectories, T positions, N positions that are read, D hidden units.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lar_lightning.artefacts import differences, replacing, write_json
from lar_lightning.batches import DistillationBatch
from lar_lightning.distributed.processes import is_any

Read = Callable[[Tensor, Tensor], Tensor]
"""Ids and mask to hidden states."""


class TeacherCache:
    """A folder of safetensors files, one for each batch that had something new."""

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        """Open the folder; `identity` is what its entries depend on beside their content."""
        self.folder = folder
        self._files: dict[str, Path] = {}
        manifest = folder / "identity.json"
        stored = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else None
        if stored is not None and stored != identity:
            print(f"teacher cache: made anew ({differences(stored, identity)})", flush=True)
            for file in folder.glob("*.safetensors"):
                file.unlink(missing_ok=True)
        write_json(manifest, dict(identity))
        for file in sorted(folder.glob("*.safetensors")):
            keys = _keys(file)
            if keys is None:  # the trajectories in it are read by the teacher again
                print(f"teacher cache: removed {file}, which is damaged", flush=True)
                file.unlink(missing_ok=True)
            self._files |= dict.fromkeys(keys or (), file)
        if self._files:
            print(f"teacher cache: reused {folder} ({len(self._files)} trajectories)", flush=True)

    def hidden(
        self, batch: DistillationBatch, read: Read, *, is_together: bool = False
    ) -> Float[Tensor, "B T D"]:
        """Return the teacher's hidden states at positions of the loss, zero at all others.

        Processes that share out the teacher read with it together, or not at all.
        """
        positions = _positions(batch)
        keys = [
            _key(ids[mask.bool()], at)
            for ids, mask, at in zip(batch.teacher_ids, batch.teacher_mask, positions, strict=True)
        ]
        missing = [row for row, key in enumerate(keys) if key not in self._files]
        if is_together and is_any(bool(missing), batch.teacher_ids.device):
            missing = missing or [0]
        if missing:
            states = read(batch.teacher_ids[missing], batch.teacher_mask[missing])
            self._write(
                {
                    keys[row]: of_row[positions[row]]
                    for row, of_row in zip(missing, states, strict=True)
                }
            )
        found = self._read(keys, batch.teacher_ids.device)
        hidden = found[0].new_zeros(*batch.teacher_ids.shape, found[0].shape[1])
        for row, states in enumerate(found):
            hidden[row, positions[row]] = states
        return hidden

    def _write(self, states: Mapping[str, Float[Tensor, "N D"]]) -> None:
        from safetensors.torch import save_file

        name = sha256("".join(sorted(states)).encode()).hexdigest()[:32]
        path = self.folder / f"{name}.safetensors"
        with replacing(path) as temporary:
            save_file({key: value.contiguous().cpu() for key, value in states.items()}, temporary)
        self._files |= dict.fromkeys(states, path)

    def _read(self, keys: Iterable[str], device: torch.device) -> list[Float[Tensor, "N D"]]:
        from safetensors import safe_open

        states = []
        for key in keys:
            with safe_open(self._files[key], framework="pt", device=str(device)) as file:
                states.append(file.get_tensor(key))
        return states


def _keys(file: Path) -> list[str] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError:
        return None


def _positions(batch: DistillationBatch) -> list[Int[Tensor, " N"]]:
    """Return the positions at which the loss reads each trajectory, ascending."""
    num_rows, length = batch.teacher_ids.shape
    places = torch.cat([batch.teacher_rows, batch.decisions.teacher_rows]).unique()
    return [places[places // length == row] % length for row in range(num_rows)]


def _key(ids: Tensor, positions: Tensor) -> str:
    content = json.dumps([ids.tolist(), positions.tolist()])
    return sha256(content.encode()).hexdigest()[:32]
