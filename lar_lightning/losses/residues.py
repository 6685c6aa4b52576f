"""What of the teacher's text is left to a row once latents have taken their share of it.

A latent z of segment v w could have been taken at a row where the student wrote v. The student
gives both ways some probability, and both lead to texts that begin with v. For its *text* to be
distributed as the teacher's, the explicit way must write w as often as is left over:

    residue(w) = (P_T(w) - a) / (1 - a),  residue(other) = P_T(other) / (1 - a)

with a the share of the student's probability of the text so far that lies in z. Nothing is excluded
while the latent is never taken (a = 0), and all that encoding excludes once it always is (a =
P_T(w)). In general, at a row after units u_i..u_j and for all latents z pending there,

    a_z = r_z / (1 + sum of r),  r_z = P_S(z | before u_i) / (P_S(u_i) ... P_S(u_j))

which asks for the student's own probabilities alone, also where a rest has several tokens: no
counterfactual is needed, and no row is sampled. A student that encodes as the teacher's texts are
encoded is at zero in both forms; one that does not is asked for the right text by this one, where
exclusion leaves it nothing right to write behind a token that it should have abbreviated.

The shares are read without gradient: a latent learns where it is due from the split term.

Dimensions: R rows, V base tokens, K latents, D hidden units, N pending latents of all rows.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lar_lightning.batches import Pendings, RowTargets
from lar_lightning.losses.splits import unit_logits

if TYPE_CHECKING:
    from lar_lightning.losses.distillation import Heads

LEAST_LEFT = 1e-8
"""Odds of a token, against those that it had, that are always left: no divergence is infinite."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Residues:
    """Shares of the student's text that lie in pending latents."""

    rows: Int[Tensor, " N"]
    """Ascending."""
    tokens: Int[Tensor, " N"]
    """The next base token of each latent's rest."""
    shares: Float[Tensor, " N"]

    def chunk(self, start: int, end: int) -> "Residues":
        """Return what belongs to rows start..end."""
        low, high = torch.searchsorted(
            self.rows, torch.tensor([start, end], device=self.rows.device)
        ).tolist()
        return Residues(
            rows=self.rows[low:high] - start,
            tokens=self.tokens[low:high],
            shares=self.shares[low:high],
        )

    def left_of(self, logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """Return the teacher's logits less what the latents have taken."""
        if not len(self.rows):
            return logits
        places, index = (self.rows * logits.shape[1] + self.tokens).unique(return_inverse=True)
        shares = torch.zeros_like(places, dtype=logits.dtype)
        shares = shares.index_add(0, index, self.shares.to(logits.dtype))
        rows, tokens = places // logits.shape[1], places % logits.shape[1]
        distinct, row_index = rows.unique(return_inverse=True)
        partition = logits[distinct].logsumexp(1)[row_index]
        log_probability = logits[rows, tokens] - partition
        probability, others = log_probability.exp(), -torch.expm1(log_probability)
        left = torch.maximum(probability - shares, LEAST_LEFT * probability * others)
        smallest = torch.finfo(logits.dtype).tiny
        return logits.index_put((rows, tokens), partition + left.clamp_min(smallest).log())


@torch.no_grad()
def residues(
    student_hidden: Float[Tensor, "R D"],
    heads: "Heads",
    targets: RowTargets,
    pendings: Pendings,
    *,
    rows_per_chunk: int = 64,
) -> Residues:
    """Return the share of each pending latent, by the student's own probabilities.

    Args:
        student_hidden: At the rows of the loss.
        heads: Of which the student's are read.
        targets: The units that were written.
        pendings: Latents that could have been.
        rows_per_chunk: Rows projected at a time; only those between a latent's start and the row
            where it is pending are.
    """
    num_rows = len(targets)
    ones = torch.ones_like(pendings.rows)
    steps = torch.zeros(num_rows + 1, dtype=torch.int64, device=ones.device)
    steps = steps.index_add(0, pendings.starts, ones).index_add(0, pendings.rows, -ones)
    needed = steps[:-1].cumsum(0).nonzero()[:, 0]
    of_written = torch.zeros(num_rows, dtype=torch.float64, device=ones.device)
    of_latent = torch.zeros(len(ones), dtype=torch.float64, device=ones.device)
    for rows in needed.split(rows_per_chunk):
        base_logits = _projected(student_hidden[rows], heads.base.to(heads.teacher.dtype))
        latent_logits = _projected(student_hidden[rows], heads.latent)
        partition = torch.cat([base_logits, latent_logits], 1).logsumexp(1)
        places = torch.arange(len(rows), device=rows.device)
        written = unit_logits(base_logits, latent_logits, places, targets.units[rows])
        of_written[rows] = (written - partition).double()
        entries = torch.isin(pendings.starts, rows).nonzero()[:, 0]
        places = torch.searchsorted(rows, pendings.starts[entries])
        could = unit_logits(base_logits, latent_logits, places, pendings.units[entries])
        of_latent[entries] = (could - partition[places]).double()
    so_far = torch.cat([of_written.new_zeros(1), of_written.cumsum(0)])
    ratio = of_latent - (so_far[pendings.rows] - so_far[pendings.starts])
    # Softmax over what was written (ratio 0) and the latents pending at the same row.
    largest = of_written.new_zeros(num_rows).scatter_reduce(0, pendings.rows, ratio, "amax")
    relative = (ratio - largest[pendings.rows]).exp()
    total = (-largest).exp().index_add(0, pendings.rows, relative)
    return Residues(
        rows=pendings.rows, tokens=pendings.tokens, shares=relative / total[pendings.rows]
    )


def _projected(hidden: Tensor, matrix: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = functional.linear(hidden.to(matrix.dtype), matrix)
    return logits if logits.dtype == torch.float64 else logits.float()
