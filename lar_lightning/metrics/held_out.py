"""What training does to the horizon and to behaviour, row by row of held-out trajectories."""

from typing import cast

from torch import nn
from torchmetrics import Metric

from lar_lightning.batches import DistillationBatch
from lar_lightning.losses.folding import RowTerms
from lar_lightning.metrics.horizon import Horizon
from lar_lightning.metrics.rates import Ratio
from lar_lightning.metrics.usage import LatentUsage
from lar_lightning.models.student import Student


class MetricGroup(nn.Module):
    """Metrics that are moved and emptied together."""

    def reset(self) -> None:
        """Empty all of them."""
        for metric in self.children():
            cast(Metric, metric).reset()


class HeldOutMetrics(MetricGroup):
    """Metrics of the teacher's own text, as the student reads it."""

    def __init__(self, num_latents: int) -> None:
        """Start empty."""
        super().__init__()
        self.horizon = Horizon()
        self.usage = LatentUsage(num_latents)
        self.agreement = Ratio()
        self.loss = Ratio()

    def update(self, student: Student, batch: DistillationBatch, terms: RowTerms) -> None:
        """Count the rows of a batch."""
        units = batch.targets.units
        is_latent = units >= student.base_size
        latents = units[is_latent] - student.base_size
        lengths = student.unit_lengths[(units - student.base_size).clamp_min(-1)]
        self.horizon.update(
            lengths,
            num_prompt_units=batch.student_mask.sum() - len(units),
            num_prompt_tokens=batch.teacher_mask.sum() - lengths.sum(),
        )
        self.usage.update(latents, latents, (-terms.split[is_latent]).exp())
        self.agreement.add(terms.agrees.float())
        self.loss.add(terms.folded + terms.split)

    def values(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Return the figures of all processes by name, and the histograms of usage.

        All processes must ask together.
        """
        usage = self.usage.compute()
        histograms = {name: usage.pop(name).tolist() for name in ("due", "taken")}
        figures = {
            **self.horizon.compute(),
            "expected_adoption": usage.pop("adoption"),
            **usage,
            "row_agreement": self.agreement.compute(),
        }
        return {name: float(value) for name, value in figures.items()}, histograms
