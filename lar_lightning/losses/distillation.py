"""The exact trajectory-level KL of a latent student from an expanded teacher, row by row.

With p_T the teacher's next-token distribution and p_S the student's next-unit distribution at
paired rows, v* the token and u* the unit that follow, and p~_S(v) = sum of p_S(u) over units u
that begin with token v (*folding*):

    folded = KL(p || p~_S),  p = p_T without banned tokens, renormalized; one-hot on v* where the
             row is sampled
    split  = -log(p_S(u*) / p~_S(v*))

Summed over the rows of trajectories sampled from the teacher at temperature 1 this is an unbiased
estimate of KL(P_T(trajectory) || P_S(encode(trajectory))), up to the entropy of what is sampled
(algorithm 4). `DistillationSettings` names other forms of both terms.

Folding comes before tempering: the folded distribution at temperature 1 is what the student says of
the next token, and that is tempered, as the teacher's is. Tempering units before folding would
give a token the more mass the more latents begin with it: a student equal to its teacher would not
be at the minimum.

Dimensions: R rows, V base tokens, K latents, D hidden units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lar_lightning.batches import DistillationBatch, RowTargets
from lar_lightning.losses.folding import Folding, RowTerms, row_terms
from lar_lightning.losses.offers import OfferTarget
from lar_lightning.losses.residues import Residues
from lar_lightning.losses.splits import SplitTarget
from lar_lightning.settings import DistillationSettings


@dataclass(frozen=True, kw_only=True, eq=False)
class Heads:
    """Output matrices: logits are `hidden @ matrix.T`."""

    teacher: Float[Tensor, "V D"]
    base: Float[Tensor, "V D"]
    """The student's for base tokens; the teacher's own where it is frozen."""
    latent: Float[Tensor, "K D"]


def distillation_loss(
    teacher_hidden: Float[Tensor, "R D"],
    student_hidden: Float[Tensor, "R D"],
    heads: Heads,
    targets: RowTargets,
    folding: Folding,
    *,
    settings: DistillationSettings = DistillationSettings(),
    split_target: SplitTarget | OfferTarget | None = None,
    residues: Residues | None = None,
    rows_per_chunk: int = 64,
) -> tuple[Float[Tensor, ""], RowTerms]:
    """Return the weighted mean over rows of `folded + split_weight * split`, and detached terms.

    Projection and loss run chunk by chunk, and so does their backward, at once: no tensor of (R x
    V) is ever alive, and nothing is projected twice. Gradients reach `student_hidden`,
    `heads.latent` and, where it is trained, `heads.base`. 64 rows of 49,152 logits in fp32 are
    12.6 MB; on a CPU more is slower, on a GPU take some thousand.
    """
    loss, folded, split, agrees = _ChunkedLoss.apply(
        student_hidden,
        heads.latent,
        heads.base,
        teacher_hidden,
        heads.teacher,
        targets,
        folding,
        settings,
        split_target,
        residues,
        rows_per_chunk,
        torch.is_grad_enabled(),  # inside the function it never is
    )  # type: ignore[misc]
    return loss, RowTerms(folded=folded, split=split, agrees=agrees)


def row_weights(targets: RowTargets, settings: DistillationSettings) -> Float[Tensor, " R"]:
    """Return each row's weight in the mean."""
    since = targets.num_since_latent
    is_after = (since >= 0) & (since < settings.num_rows_after_latent)
    return torch.where(is_after, settings.weight_after_latent, 1.0)


class _ChunkedLoss(torch.autograd.Function):
    """Forward computes the gradients as well; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        latent_head: Tensor,
        base_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        targets: RowTargets,
        folding: Folding,
        settings: DistillationSettings,
        split_target: SplitTarget | OfferTarget | None,
        residues: Residues | None,
        rows_per_chunk: int,
        is_training: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = (student_hidden, latent_head, base_head)
        needed = [is_training and needs for needs in ctx.needs_input_grad[:3]]
        # Many chunks add up in a head's gradient: in fp32 whatever the head is in.
        gradients = [
            torch.zeros_like(tensor, dtype=_wide(tensor.dtype)) if needs else None
            for tensor, needs in zip(inputs, needed, strict=True)
        ]
        # Trained weights are in fp32; they are projected in the precision of the frozen ones.
        matrix = base_head.to(teacher_head.dtype)
        weights = row_weights(targets, settings)
        total_weight = weights.sum()
        loss = torch.zeros((), dtype=_wide(student_hidden.dtype), device=student_hidden.device)
        terms: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(student_hidden), rows_per_chunk):
            rows = slice(start, min(start + rows_per_chunk, len(student_hidden)))
            hidden = student_hidden[rows]
            teacher, *logits = _projected(
                teacher_hidden[rows], hidden, teacher_head, matrix, latent_head
            )
            with torch.set_grad_enabled(any(needed)):
                base_logits, latent_logits = (part.requires_grad_(any(needed)) for part in logits)
                chunk = row_terms(
                    teacher,
                    base_logits,
                    latent_logits,
                    targets.chunk(rows.start, rows.stop),
                    folding,
                    settings,
                    split_target and split_target.chunk(rows.start, rows.stop),
                    residues and residues.chunk(rows.start, rows.stop),
                )
                nats = chunk.folded + settings.split_weight * chunk.split
                share = (nats * weights[rows]).sum() / total_weight
            if any(needed):
                slopes = torch.autograd.grad(share, (base_logits, latent_logits))
                _add_gradients(gradients, rows, hidden, matrix, latent_head, slopes)
            loss += share.detach()
            # Detached: through its graph a term would keep the chunk's logits alive.
            terms.append((chunk.folded.detach(), chunk.split.detach(), chunk.agrees))
        folded, split, agrees = (torch.cat(parts) for parts in zip(*terms, strict=True))
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.mark_non_differentiable(folded, split, agrees)
        return loss, folded, split, agrees

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = [
            None if saved is None else (saved * gradients[0]).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, *(None,) * 9


def _projected(
    teacher_hidden: Float[Tensor, "R D"],
    student_hidden: Float[Tensor, "R D"],
    teacher_head: Float[Tensor, "V D"],
    base_head: Float[Tensor, "V D"],
    latent_head: Float[Tensor, "K D"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the teacher's logits, and the student's for base tokens and latents, in fp32."""
    dtype = teacher_head.dtype
    with torch.autocast(student_hidden.device.type, enabled=False):
        return (
            _widened(functional.linear(teacher_hidden.to(dtype), teacher_head)),
            _widened(functional.linear(student_hidden.to(dtype), base_head)),
            functional.linear(_widened(student_hidden), _widened(latent_head)),
        )


def _add_gradients(
    gradients: Sequence[Tensor | None],
    rows: slice,
    hidden: Float[Tensor, "R D"],
    matrix: Float[Tensor, "V D"],
    latent_head: Float[Tensor, "K D"],
    slopes: Sequence[Tensor],
) -> None:
    """Add one chunk's gradients to those of hidden states, latent head and base head.

    `slopes` are those of the base and the latent logits.
    """
    of_hidden, of_latent, of_base = gradients
    with torch.autocast(hidden.device.type, enabled=False):
        base_slope = slopes[0].to(matrix.dtype)
        if of_hidden is not None:
            of_hidden[rows] = base_slope @ matrix
            of_hidden[rows] += slopes[1] @ _widened(latent_head)
        if of_latent is not None:
            of_latent += slopes[1].T @ _widened(hidden)
        if of_base is not None:
            of_base += base_slope.T @ hidden.to(matrix.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _widened(tensor: Tensor) -> Tensor:
    """Return a tensor in fp32, or as it is where a check computes in fp64."""
    return tensor.to(_wide(tensor.dtype))


def fault_of(loss: Tensor, terms: RowTerms, batch: DistillationBatch) -> str | None:
    """Say which term of which trajectories is not finite, where the loss is not."""
    if loss.isfinite():
        return None
    parts = []
    for name in ("folded", "split"):
        rows = (~getattr(terms, name).isfinite()).nonzero().flatten()
        if len(rows):
            owners = (batch.student_rows[rows] // batch.student_ids.shape[1]).unique().tolist()
            names = ", ".join(batch.trajectory_ids[owner] for owner in owners)
            parts.append(f"the {name} term in {len(rows)} of {len(batch.targets)} rows, of {names}")
    return "; ".join(parts) or f"the mean of finite rows, of {', '.join(batch.trajectory_ids)}"
