"""Faults that a callback brings into one process of a run."""

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lar_lightning.batches import DistillationBatch
from lar_lightning.module import LatentActionModule


class NotANumber(L.Callback):
    """Lets the second process compute a loss that is not finite, at the step with index 2."""

    @override
    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: DistillationBatch,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, LatentActionModule)
        if trainer.global_rank != 1 or trainer.global_step != 2:
            return
        hidden = pl_module._hidden

        def spoiled(*arguments: object, **options: object) -> tuple[Tensor, Tensor]:
            teacher, student = hidden(*arguments, **options)  # type: ignore[arg-type]
            return teacher, student + torch.nan

        pl_module.__dict__["_hidden"] = spoiled
