"""The exact trajectory-level KL of a latent student from an expanded teacher, row by row.

With p_T the teacher's next-token distribution and p_S the student's next-unit distribution at
paired rows, v* the token and u* the unit that follow, and p~_S(v) = sum of p_S(u) over units u
that begin with token v (*folding*):

    folded = KL(p || p~_S),  p = p_T without banned tokens, renormalized; one-hot on v* where the
    row is sampled split  = -log(p_S(u*) / p~_S(v*))

Summed over the rows of trajectories sampled from the teacher at temperature 1 this is an unbiased
estimate of KL(P_T(trajectory) || P_S(encode(trajectory))), up to the entropy of what is sampled
(algorithm 4).

Dimensions: R rows, V base tokens, K latents, G distinct first tokens of latents, D hidden units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lar_lightning.batches import RowTargets

NEVER = -1e4
"""Logit of a banned token: its probability is exactly 0 in fp32, and 0 times it is 0 where 0 times
-inf is not."""


class Folding(nn.Module):
    """Index tensors that add each latent's probability to that of its first base token."""

    first_tokens: Int[Tensor, " G"]
    group: Int[Tensor, " K"]
    group_of_token: Int[Tensor, " V"]

    def __init__(self, segments: Sequence[Sequence[int]], base_size: int) -> None:
        """Group latents by first token; `base_size` is V."""
        super().__init__()
        firsts = torch.tensor([segment[0] for segment in segments], dtype=torch.int64)
        first_tokens, group = firsts.unique(return_inverse=True)
        group_of_token = torch.full((base_size,), -1, dtype=torch.int64)
        group_of_token[first_tokens] = torch.arange(len(first_tokens))
        self.register_buffer("first_tokens", first_tokens, persistent=False)
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("group_of_token", group_of_token, persistent=False)

    def forward(
        self, base: Float[Tensor, "R V"], latent: Float[Tensor, "R K"]
    ) -> Float[Tensor, "R G"]:
        """Return the folded logits of the first tokens.

        Those of all other tokens are `base` itself.

        log(exp(base_v) + sum of exp(latent_k) over latents beginning with v), stable for any
        spread of the logits.
        """
        own = base[:, self.first_tokens]
        index = self.group.expand(len(base), -1)
        largest = own.detach().scatter_reduce(1, index, latent.detach(), "amax", include_self=True)
        total = (
            (own - largest).exp().scatter_add(1, index, (latent - largest.gather(1, index)).exp())
        )
        return largest + total.log()


@dataclass(frozen=True, kw_only=True, eq=False)
class RowTerms:
    """The two terms of each row and what callbacks want to know of it; in nats."""

    folded: Float[Tensor, " R"]
    split: Float[Tensor, " R"]
    agrees: Bool[Tensor, " R"]
    """True where the teacher's and the folded student's likeliest tokens are the same."""


def row_terms(
    teacher_logits: Float[Tensor, "R V"],
    base_logits: Float[Tensor, "R V"],
    latent_logits: Float[Tensor, "R K"],
    targets: RowTargets,
    folding: Folding,
) -> RowTerms:
    """Compute the terms of paired rows.

    Args:
        teacher_logits: Of base tokens, in fp32.
        base_logits: The student's for base tokens, in fp32.
        latent_logits: The student's for latents, in fp32.
        targets: What follows each row, and its pending corrections.
        folding: Of the vocabulary that the latents are from.
    """
    folded_first = folding(base_logits, latent_logits)
    folded_logits = base_logits.index_copy(1, folding.first_tokens, folded_first)
    log_partition = folded_logits.logsumexp(
        1
    )  # folding keeps the total, so this is the student's over all units
    at_token = folded_logits.gather(1, targets.tokens[:, None])[:, 0]

    with torch.no_grad():
        teacher = teacher_logits
        if len(targets.banned_rows):
            teacher = teacher.index_put(
                (targets.banned_rows, targets.banned_tokens), teacher.new_tensor(NEVER)
            )
        teacher_partition = teacher.logsumexp(1)
        probability = (teacher - teacher_partition[:, None]).exp_()
        negative_entropy = torch.linalg.vecdot(probability, teacher) - teacher_partition
    soft = negative_entropy - torch.linalg.vecdot(probability, folded_logits) + log_partition
    folded = torch.where(targets.is_sampled, log_partition - at_token, soft)

    is_latent = targets.units >= base_logits.shape[1]
    unit_logit = torch.where(
        is_latent,
        torch.cat(
            [latent_logits, base_logits[:, :1]], 1
        ).gather(  # the extra column keeps an empty vocabulary indexable
            1, (targets.units - base_logits.shape[1]).clamp_min(0)[:, None]
        )[:, 0],
        base_logits.gather(1, targets.units.clamp_max(base_logits.shape[1] - 1)[:, None])[:, 0],
    )
    split = at_token - unit_logit
    with torch.no_grad():
        agrees = teacher.argmax(1) == folded_logits.argmax(1)
    return RowTerms(folded=folded, split=split, agrees=agrees)


@dataclass(frozen=True, kw_only=True, eq=False)
class Heads:
    """Output matrices: logits are `hidden @ matrix.T`."""

    base: Float[Tensor, "V D"]
    """Shared by teacher and student where both are the same weights."""
    latent: Float[Tensor, "K D"]


def distillation_loss(
    teacher_hidden: Float[Tensor, "R D"],
    student_hidden: Float[Tensor, "R D"],
    heads: Heads,
    targets: RowTargets,
    folding: Folding,
    *,
    split_weight: float = 1.0,
    rows_per_chunk: int = 64,
) -> tuple[Float[Tensor, ""], RowTerms]:
    """Return the mean over rows of `folded + split_weight * split`, and the detached terms.

    Projection and loss run chunk by chunk, and so does their backward, at once: no tensor of (R x
    V) is ever alive, and nothing is projected twice. Gradients reach `student_hidden` and
    `heads.latent`; the base matrix stays frozen. 64 rows of 49,152 logits in fp32 are 12.6 MB; on
    a CPU more is slower, on a GPU take some thousand.
    """
    loss, folded, split, agrees = _ChunkedLoss.apply(
        student_hidden,
        heads.latent,
        teacher_hidden,
        heads.base,
        targets,
        folding,
        split_weight,
        rows_per_chunk,
        torch.is_grad_enabled(),  # inside the function it never is
    )  # type: ignore[misc]
    return loss, RowTerms(folded=folded, split=split, agrees=agrees)


class _ChunkedLoss(torch.autograd.Function):
    """Forward computes the gradients as well; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        latent_head: Tensor,
        teacher_hidden: Tensor,
        base_head: Tensor,
        targets: RowTargets,
        folding: Folding,
        split_weight: float,
        rows_per_chunk: int,
        is_training: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs_gradient = is_training and any(ctx.needs_input_grad[:2])
        hidden = student_hidden.detach().requires_grad_(needs_gradient)
        head = latent_head.detach().requires_grad_(needs_gradient)
        terms: list[RowTerms] = []
        for start in range(0, len(hidden), rows_per_chunk):
            rows = slice(start, min(start + rows_per_chunk, len(hidden)))
            with torch.no_grad():
                teacher_logits = functional.linear(teacher_hidden[rows], base_head).float()
            with torch.set_grad_enabled(needs_gradient):
                base_logits = functional.linear(hidden[rows], base_head).float()
                latent_logits = functional.linear(hidden[rows].float(), head.float())
                chunk = row_terms(
                    teacher_logits,
                    base_logits,
                    latent_logits,
                    targets.chunk(rows.start, rows.stop),
                    folding,
                )
                if needs_gradient:
                    ((chunk.folded + split_weight * chunk.split).sum() / len(hidden)).backward()
            terms.append(chunk)
        folded, split, agrees = (
            torch.cat([getattr(chunk, name).detach() for chunk in terms])
            for name in ("folded", "split", "agrees")
        )
        if needs_gradient:
            ctx.save_for_backward(hidden.grad, head.grad)
        ctx.mark_non_differentiable(folded, split, agrees)
        return (folded + split_weight * split).mean(), folded, split, agrees

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_gradient, head_gradient = ctx.saved_tensors
        return hidden_gradient * gradients[0], head_gradient * gradients[0], *(None,) * 7
