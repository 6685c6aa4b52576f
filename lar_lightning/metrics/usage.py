"""Which latents are used: histogram, perplexity, dead ones, adoption.

A latent is *due* where the leftmost-longest code of a text has it, and *taken* where the student
takes it: teacher-forced with a probability, in what it writes itself with certainty.

Dimensions: K latents, N places, M of them where one was taken.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

DEAD_SHARE = 0.05
"""A latent that is taken in less than this share of the places where it is due is dead."""


class LatentUsage(Metric):
    """Counts of each latent: how often it was due, and how often it was taken."""

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    due: Float[Tensor, " K"]
    taken: Float[Tensor, " K"]

    def __init__(self, num_latents: int) -> None:
        """Start at zero for each latent."""
        super().__init__()
        for name in ("due", "taken"):
            self.add_state(
                name,
                default=torch.zeros(num_latents, dtype=torch.float64),
                dist_reduce_fx="sum",
            )

    @override
    def update(
        self,
        due: Int[Tensor, " N"],
        taken: Int[Tensor, " M"],
        weights: Float[Tensor, " M"] | None = None,
    ) -> None:
        """Count some places.

        Args:
            due: Latents (0..K-1) that the code has, one for each place.
            taken: Latents that were taken.
            weights: With which probability each was; 1 by default.
        """
        weights = torch.ones_like(taken, dtype=torch.float64) if weights is None else weights
        self.due.index_add_(0, due, torch.ones_like(due, dtype=torch.float64))
        self.taken.index_add_(0, taken, weights.double())

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the figures by name.

        adoption: taken latents / places where one was due; 0 where none was.
        usage_perplexity: exp of the entropy of what was taken, from 1 (one latent alone) to K (all
            alike); 0 where none was taken.
        num_dead_latents: latents that were due, and were taken in less than `DEAD_SHARE` of it.
        num_absent_latents: latents that were due nowhere: what was read says nothing of them.
        due, taken: the histograms, by latent.
        """
        total = self.taken.sum()
        shares = self.taken / total.clamp_min(1e-12)
        perplexity = torch.special.entr(shares).sum().exp()
        is_due = self.due > 0
        return {
            "adoption": total / self.due.sum().clamp_min(1),
            "usage_perplexity": torch.where(total > 0, perplexity, 0.0),
            "num_dead_latents": (is_due & (self.taken < DEAD_SHARE * self.due)).sum(),
            "num_absent_latents": (~is_due).sum(),
            "due": self.due,
            "taken": self.taken,
        }
