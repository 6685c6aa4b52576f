"""What training does to the horizon and to behaviour, on held-out trajectories."""

from typing import Any

import lightning as L
from torchmetrics import MeanMetric, SumMetric
from typing_extensions import override

from lar_lightning.batches import DistillationBatch
from lar_lightning.losses import RowTerms
from lar_lightning.module import LatentActionModule


class HorizonMetrics(L.Callback):
    """Logs horizons, agreement and the loss against its start at every validation.

    Metrics recorded, all over the rows of held-out trajectories:
        val/horizon_units: units in the loss (H_lat).
        val/horizon_tokens: base tokens that they stand for (H_eff).
        val/units_per_token: their ratio; 1 minus it is what acting in latents can save.
        val/reparameterization_rate: share of action tokens inside latents.
        val/expected_adoption: mean probability of the latent, among the units that begin alike,
            where it is due.
        val/row_agreement: share of rows whose likeliest token is the teacher's.
        val/loss_against_start: validation loss divided by that before the first step.
    """

    def __init__(self) -> None:
        """Set up the counters."""
        self.num_units, self.num_tokens, self.num_covered = SumMetric(), SumMetric(), SumMetric()
        # A sum and a count: a process whose batches have no latent still takes part.
        self.adoption, self.num_latents = SumMetric(), SumMetric()
        self.agreement, self.loss = MeanMetric(), MeanMetric()
        self.loss_at_start: float | None = None

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for metric in self._metrics():
            metric.to(pl_module.device)
            metric.reset()

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: DistillationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, LatentActionModule)
        terms: RowTerms = outputs
        units = batch.targets.units
        lengths = pl_module.student.unit_lengths[
            (units - pl_module.student.base_size).clamp_min(-1)
        ]
        is_latent = units >= pl_module.student.base_size
        self.num_units.update(units.numel())
        self.num_tokens.update(lengths.sum())
        self.num_covered.update(lengths[is_latent].sum())
        self.adoption.update((-terms.split[is_latent]).exp().sum())
        self.num_latents.update(is_latent.sum())
        self.agreement.update(terms.agrees.float())
        self.loss.update(terms.folded + terms.split)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = self.values()
        if trainer.sanity_checking and trainer.global_step > 0:
            return  # a resumed run has its start behind it
        if trainer.sanity_checking:
            # Lightning's check before training reads all held-out trajectories: the loss at
            # initialisation.
            self.loss_at_start = float(self.loss.compute())
            for logger in trainer.loggers:
                logger.log_metrics({**values, "val/loss_nats": self.loss_at_start}, step=0)
            return
        if self.loss_at_start is not None:
            values["val/loss_against_start"] = float(self.loss.compute()) / self.loss_at_start
        for name, value in values.items():
            pl_module.log(name, value, sync_dist=False)

    def values(self) -> dict[str, float]:
        """Return what has been counted."""
        units, tokens = float(self.num_units.compute()), float(self.num_tokens.compute())
        return {
            "val/horizon_units": units,
            "val/horizon_tokens": tokens,
            "val/units_per_token": units / tokens,
            "val/reparameterization_rate": float(self.num_covered.compute()) / tokens,
            "val/expected_adoption": float(self.adoption.compute())
            / max(float(self.num_latents.compute()), 1.0),
            "val/row_agreement": float(self.agreement.compute()),
        }

    def _metrics(self) -> tuple[MeanMetric | SumMetric, ...]:
        return (
            self.num_units,
            self.num_tokens,
            self.num_covered,
            self.adoption,
            self.num_latents,
            self.agreement,
            self.loss,
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"loss_at_start": self.loss_at_start}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss_at_start = state_dict["loss_at_start"]
