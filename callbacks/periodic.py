"""Something that is done before training, every so many steps, and behind the last."""

from abc import abstractmethod
from typing import Any

import lightning as L
from typing_extensions import override

from lar_lightning.module import LatentActionModule


class Periodic(L.Callback):
    """Calls `act` before the first step, at every `period` steps, and when training is over.

    Never twice at one step, and not where training only pauses: a signal or a limit of time leaves
    no time for it. A period of 0 leaves the steps between out.
    """

    def __init__(self, period: int) -> None:
        self.period = period
        self._last_step = -1

    @abstractmethod
    def act(self, trainer: L.Trainer, pl_module: LatentActionModule) -> None:
        """Do it, in all processes."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_step = trainer.global_step
        if trainer.global_step == 0:
            self._act(trainer, pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Where gradients are accumulated, several batches end at the same step.
        is_new = trainer.global_step != self._last_step
        if is_new and self.period and trainer.global_step % self.period == 0:
            self._act(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LatentActionModule)
        is_over = trainer.global_step >= pl_module.num_steps
        if is_over and trainer.global_step != self._last_step:
            self._act(trainer, pl_module)

    def _act(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LatentActionModule)
        self._last_step = trainer.global_step
        self.act(trainer, pl_module)
