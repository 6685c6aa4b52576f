"""How surely latents are taken where they are due, and left where they are not.

Of the rows whose next token some latents begin with, n of them, chance would take log(1 + n) nats
for the choice of the unit. Where more are taken on average over all these rows, the student knows
less than nothing. That holds of all of them together alone, as of every proper score: where latents
are seldom due behind their first token, a student that knows it takes many nats where one is.

Dimensions: R rows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lar_lightning.batches import RowTargets
from lar_lightning.losses.folding import Folding


@dataclass(frozen=True, kw_only=True)
class Use:
    """Means over rows; None where there was no such row."""

    choice: float | None
    """Nats for the choice of the unit, over those of chance."""
    underuse: float | None
    """The same where a latent is due."""
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
    chance = due_chance + other_chance
    return Use(
        choice=(due + other) / chance if chance else None,
        underuse=due / due_chance if due_chance else None,
        overuse=other / other_chance if other_chance else None,
        adoption=probability / num_due if num_due else None,
    )


LEAST_CHANCE = 16.0
"""Nats of chance, some twenty choices between two: with fewer, a ratio is one row's luck."""


class ChoicePool:
    """Adds up the choices of batches until there are enough of them for a ratio."""

    def __init__(self) -> None:
        """Begin with none."""
        self.nats = self.chance = 0.0

    def take_in(self, sums: Float[Tensor, "6"]) -> float | None:
        """Return nats for the choice of the unit over those of chance, if there were enough."""
        due, due_chance, other, other_chance, *_ = sums.tolist()
        self.nats += due + other
        self.chance += due_chance + other_chance
        if self.chance < LEAST_CHANCE:
            return None
        ratio = self.nats / self.chance
        self.nats = self.chance = 0.0
        return ratio
