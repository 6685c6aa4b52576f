"""How surely latents are taken where they are due, and left where they are not.

Of the rows whose next token some latents begin with, n of them, chance would take log(1 + n) nats
for the choice of the unit. Where more are taken on average, the student knows less than nothing.

Dimensions: R rows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lar_lightning.batches import RowTargets
from lar_lightning.folding import Folding


@dataclass(frozen=True, kw_only=True)
class Use:
    """Means over rows; None where there was no such row."""

    underuse: float | None
    """Nats where a latent is due, over those of chance."""
    overuse: float | None
    """The same where none is due."""
    adoption: float | None
    """Probability of the latent where it is due."""


def use_sums(
    targets: RowTargets, split: Float[Tensor, " R"], folding: Folding
) -> Float[Tensor, "6"]:
    """Return sums of nats and of chance's where a latent is due, and the same where none is.

    Behind them: the sum of the probabilities of due latents, and their number. Sums of several
    batches, or processes, add up.
    """
    if not len(folding.group):
        return split.new_zeros(6)
    group = folding.group_of_token[targets.tokens]
    counts = torch.bincount(folding.group)
    is_choice = group >= 0
    chance = torch.log1p(counts[group.clamp_min(0)].to(split)) * is_choice
    is_due = targets.units >= len(folding.group_of_token)
    is_other = is_choice & ~is_due
    parts = (
        split[is_due].sum(),
        chance[is_due].sum(),
        split[is_other].sum(),
        chance[is_other].sum(),
        (-split[is_due]).exp().sum(),
        is_due.sum().to(split),
    )
    return torch.stack(parts)


def use_of(sums: Float[Tensor, "6"]) -> Use:
    """Return the ratios of sums."""
    due, due_chance, other, other_chance, probability, num_due = sums.tolist()
    return Use(
        underuse=due / due_chance if due_chance else None,
        overuse=other / other_chance if other_chance else None,
        adoption=probability / num_due if num_due else None,
    )
