"""The progress bar: position, loss and horizon at a glance.

A live bar of rich in a terminal; lines of tqdm where output goes to a file, as on a cluster: rich
says nothing there.
"""

import math
import sys
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from typing_extensions import override

if TYPE_CHECKING:
    Base = ProgressBar
else:
    Base = object

GLANCE = {
    "train/loss_nats": "loss",
    "train/on_policy_loss_nats": "own-text loss",
    "val/loss_nats": "held-out loss",
    "val/row_agreement": "agreement",
    "val/units_per_token": "units/token",
    "gen/units_per_token": "written units/token",
    "throughput/expanded_tokens_per_second": "tokens/s",
}
"""What is shown, of what has been measured so far, in this order."""


class GlanceBar(Base):
    """What both bars show, and where a resumed epoch begins and ends."""

    _num_batches_before = 0
    _step_before = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # In mid-epoch where a run goes on; Lightning starts no epoch then.
        self._num_batches_before = trainer.fit_loop.batch_idx + 1
        self._step_before = trainer.global_step
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._num_batches_before, self._step_before = 0, trainer.global_step
        super().on_train_epoch_start(trainer, pl_module)

    @property
    @override
    def total_train_batches(self) -> int | float:
        """Batches of this epoch, those before a run was stopped included."""
        trainer = self.trainer
        total = trainer.num_training_batches
        if trainer.max_steps is not None and trainer.max_steps > 0:
            steps = trainer.max_steps - self._step_before
            batches = self._num_batches_before + steps * trainer.accumulate_grad_batches
            total = min(total, batches)
        return total

    @override
    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        known = trainer.callback_metrics
        return {
            shown: f"{float(known[name]):.3g}" for name, shown in GLANCE.items() if name in known
        }


class TerminalProgressBar(GlanceBar, RichProgressBar):
    """Live, for terminals."""

    def __init__(self, **options: Any) -> None:
        """Redraw four times a second: more would take time from training on few cores."""
        super().__init__(refresh_rate=4, **options)


class PlainProgressBar(GlanceBar, TQDMProgressBar):  # type: ignore[override]
    """For files."""

    @override
    def on_train_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        super().on_train_start(trainer, pl_module)
        bar, total = self.train_progress_bar, self.total_train_batches
        bar.total = total if math.isfinite(total) else None
        bar.initial = bar.n = self._num_batches_before
        bar.set_description(f"Epoch {trainer.current_epoch}")


def progress_bar() -> ProgressBar:
    """Return the bar that fits where output goes."""
    return TerminalProgressBar() if sys.stdout.isatty() else PlainProgressBar()
