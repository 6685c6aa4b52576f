"""Lightning's strategy for FSDP2, with checkpoints of what is trained and nothing else.

Its own would gather, or write, the frozen base model with every checkpoint, could not read back a
checkpoint without it, and would overwrite the last one in place.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lar_lightning.artefacts import disk_error
from lar_lightning.distributed.sharding import as_shard, local_rows
from lar_lightning.errors import SettingError
from lar_lightning.recovery.checkpoints import (
    META,
    Rows,
    next_path,
    read_checkpoint,
    remove,
    shard_name,
    split_shards,
    take_place,
)


class RunCheckpointIO(TorchCheckpointIO):
    """Reads files and folders, and writes files that take the place of either."""

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        pending = next_path(Path(path))
        remove(pending)
        super().save_checkpoint(checkpoint, pending, storage_options)
        take_place(Path(path))

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes."""

    def __init__(
        self, save_distributed_checkpoint: bool = True, timeout_minutes: float = 30.0
    ) -> None:
        """Set up the strategy.

        Args:
            save_distributed_checkpoint: Each process writes its share into a folder; False gathers
                all in the first process, which writes one file. Either is resumed under any number
                of processes.
            timeout_minutes: How long a process waits for the others before it gives up. Rollouts
                and mining, which one process does for all, are waited for without limit.
        """
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timedelta(minutes=timeout_minutes),
        )

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def setup(self, trainer: L.Trainer) -> None:
        # What FSDP gathers in inference mode could not be trained with afterwards.
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        ):
            loop.inference_mode = False
        super().setup(trainer)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # the module itself says what a checkpoint holds

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(str(filepath)))
        if not self._save_distributed_checkpoint:
            content = _gathered(checkpoint, is_kept=self.is_global_zero)
            self._together(lambda: self._write_file(content, path))
            return
        pending = next_path(path)
        content, shards = split_shards(checkpoint)
        self._together(lambda: self._make_folder(pending))
        self._together(lambda: self._write_shard(content, shards, pending))
        self._together(lambda: take_place(path) if self.is_global_zero else None)

    def _write_file(self, content: dict[str, Any], path: Path) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(content, path)

    def _make_folder(self, pending: Path) -> None:
        if self.is_global_zero:
            remove(pending)
            pending.mkdir(parents=True)

    def _write_shard(
        self, content: dict[str, Any], shards: dict[str, Tensor], pending: Path
    ) -> None:
        from safetensors.torch import save_file

        save_file(shards, pending / shard_name(self.global_rank, self.world_size))
        if self.is_global_zero:
            torch.save({**content, "num_shards": self.world_size}, pending / META)

    def _together(self, work: Any) -> None:
        """Let all processes do their part of writing; if one cannot, all stop with its reason."""
        error: Exception | None = None
        try:
            work()
        except Exception as caught:
            error = caught
        faults: list[tuple[str | None, str] | None] = [None] * self.world_size
        torch.distributed.all_gather_object(faults, error and (disk_error(error), repr(error)))
        for rank, fault in enumerate(faults):
            if fault is None:
                continue
            reason, told = fault
            if reason is not None:
                raise SettingError(
                    "`run_dir` must be a place with room that every process can write to, got: "
                    f"{reason} (process {rank}). Free space or mend it; the checkpoint before this "
                    "one is kept."
                ) from error
            raise error or RuntimeError(f"process {rank} could not write its share: {told}")

    @override
    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        mesh = self.device_mesh["data_parallel"]

        def place(shape: torch.Size, rows: Rows) -> Tensor:
            local = rows(local_rows(shape[0], mesh)).clone()
            return as_shard(local.to(self.root_device), shape, mesh)

        def placed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: value
                # Counters of steps are alike everywhere; what a folder holds is placed already.
                if not value.ndim or isinstance(value, DTensor)
                else place(value.shape, value.__getitem__)
                for name, value in tensors.items()
            }

        content = read_checkpoint(Path(self.broadcast(str(checkpoint_path))), place)
        content["state_dict"] = placed(content["state_dict"])
        for optimizer in content.get("optimizer_states", ()):
            optimizer["state"] = {key: placed(state) for key, state in optimizer["state"].items()}
        return content

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        ParallelStrategy.load_model_state_dict(self, checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)


def _gathered(content: Any, *, is_kept: bool) -> Any:
    """Return nested content with shared-out tensors whole, on the CPU, in one process."""
    if isinstance(content, DTensor):
        full = content.full_tensor()
        return full.detach().cpu() if is_kept else None
    if isinstance(content, Mapping):
        return {key: _gathered(value, is_kept=is_kept) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_gathered(value, is_kept=is_kept) for value in content)
    return content
