"""The split term: which of the units that begin with the same token the student should take.

Its target is a distribution over units for each row, kept as few (row, unit, weight) entries that
sum to 1 in each row.

Dimensions: R rows, V base tokens, K latents, D hidden units, Q decisions, E entries of all rows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lar_lightning.batches import Decisions, RowTargets


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitTarget:
    """What should be taken at each row."""

    rows: Int[Tensor, " E"]
    """Ascending."""
    units: Int[Tensor, " E"]
    weights: Float[Tensor, " E"]

    def chunk(self, start: int, end: int) -> "SplitTarget":
        """Return the entries of rows start..end."""
        low, high = torch.searchsorted(
            self.rows, torch.tensor([start, end], device=self.rows.device)
        ).tolist()
        return SplitTarget(
            rows=self.rows[low:high] - start,
            units=self.units[low:high],
            weights=self.weights[low:high],
        )


def taken_units(targets: RowTargets) -> SplitTarget:
    """Return the target that is the unit taken at each row."""
    rows = torch.arange(len(targets), device=targets.units.device)
    return SplitTarget(rows=rows, units=targets.units, weights=torch.ones_like(rows).float())


@torch.no_grad()
def expected_units(
    teacher_hidden: Float[Tensor, "Q D"],
    teacher_head: Float[Tensor, "V D"],
    decisions: Decisions,
    targets: RowTargets,
    *,
    rows_per_chunk: int = 64,
) -> SplitTarget:
    """Return the target in which decisions are replaced by the teacher's expectation of them.

    Args:
        teacher_hidden: At the decisions' rows.
        teacher_head: The teacher's output matrix.
        decisions: Where one more token decides.
        targets: Whose units stay the target of all other rows.
        rows_per_chunk: Rows projected at a time.
    """
    starts = range(0, len(decisions.rows), rows_per_chunk)
    probabilities: list[Tensor] = [teacher_hidden.new_empty(0)]
    for start in starts:
        end = min(start + rows_per_chunk, len(decisions.rows))
        low, high = torch.searchsorted(
            decisions.completing, torch.tensor([start, end], device=targets.units.device)
        ).tolist()
        logits = functional.linear(teacher_hidden[start:end], teacher_head)
        log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)
        of_token = log_p[decisions.completing[low:high] - start, decisions.tokens[low:high]]
        probabilities.append(of_token.exp())
    probability = torch.cat(probabilities[1:] or probabilities)
    rest = torch.ones_like(decisions.rows, dtype=probability.dtype)
    rest = rest.index_add(0, decisions.completing, -probability).clamp_min(0)
    certain = taken_units(targets)
    is_certain = torch.ones_like(targets.is_sampled)
    is_certain[decisions.rows] = False
    rows = [certain.rows[is_certain], decisions.rows, decisions.rows[decisions.completing]]
    units = [certain.units[is_certain], decisions.fallback_units, decisions.units]
    weights = [certain.weights[is_certain].to(probability.dtype), rest, probability]
    order = torch.cat(rows).argsort(stable=True)
    return SplitTarget(
        rows=torch.cat(rows)[order],
        units=torch.cat(units)[order],
        weights=torch.cat(weights)[order],
    )


def unit_logits(
    base_logits: Float[Tensor, "R V"],
    latent_logits: Float[Tensor, "R K"],
    rows: Int[Tensor, " E"],
    units: Int[Tensor, " E"],
) -> Float[Tensor, " E"]:
    """Return the logits of some units, explicit or latent, at some rows."""
    size = base_logits.shape[1]
    explicit = base_logits[rows, units.clamp_max(size - 1)]
    if not latent_logits.shape[1]:
        return explicit
    return torch.where(units < size, explicit, latent_logits[rows, (units - size).clamp_min(0)])
