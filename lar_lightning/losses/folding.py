"""Folding: what the student says of the next base token, and the terms of a row that follow.

The next token is v with probability p~_S(v) = sum of p_S(u) over units u that begin with v, which
sums to 1 and truncates nothing.

Dimensions: R rows, V base tokens, K latents, G distinct first tokens of latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lar_lightning.batches import RowTargets
from lar_lightning.losses.divergences import Banned, binary_divergence, divergence
from lar_lightning.losses.offers import OfferTarget, offered_divergence
from lar_lightning.losses.residues import Residues
from lar_lightning.losses.splits import SplitTarget, taken_units, unit_logits
from lar_lightning.settings import DistillationSettings


class Folding(nn.Module):
    """Index tensors that add each latent's probability to that of its first base token."""

    first_tokens: Int[Tensor, " G"]
    group: Int[Tensor, " K"]
    group_of_token: Int[Tensor, " V"]
    goes_on_from: Bool[Tensor, "K K"]
    """True at (z, z') where the segment of z' begins with that of z."""

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
        self.register_buffer("goes_on_from", _prefixes(segments), persistent=False)

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


def _prefixes(segments: Sequence[Sequence[int]]) -> Bool[Tensor, "K K"]:
    latent_of = {tuple(segment): latent for latent, segment in enumerate(segments)}
    begins = torch.zeros(len(segments), len(segments), dtype=torch.bool)
    for latent, segment in enumerate(segments):
        for length in range(2, len(segment) + 1):
            prefix = latent_of.get(tuple(segment[:length]))
            if prefix is not None:
                begins[prefix, latent] = True
    return begins


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
    settings: DistillationSettings = DistillationSettings(),
    split_target: SplitTarget | OfferTarget | None = None,
    residues: Residues | None = None,
) -> RowTerms:
    """Compute the terms of paired rows.

    Args:
        teacher_logits: Of base tokens, in fp32.
        base_logits: The student's for base tokens, in fp32.
        latent_logits: The student's for latents, in fp32.
        targets: What follows each row, and its pending corrections.
        folding: Of the vocabulary that the latents are from.
        settings: Forms of the terms.
        split_target: What the split term asks for; default: the units taken. Offers where the
            student wrote the text.
        residues: What pending latents have taken; default: all that encoding would give them.
    """
    folded_first = folding(base_logits, latent_logits)
    folded_logits = base_logits.index_copy(1, folding.first_tokens, folded_first)
    nothing = Banned(rows=targets.banned_rows[:0], tokens=targets.banned_tokens[:0])
    banned = Banned(rows=targets.banned_rows, tokens=targets.banned_tokens)
    is_sampled = targets.is_sampled
    if residues is not None:
        teacher_logits, banned = residues.left_of(teacher_logits), nothing
        is_sampled = torch.zeros_like(is_sampled)
    # Folding keeps the total, so this is the student's over all units.
    log_partition = folded_logits.logsumexp(1)
    at_token = folded_logits.gather(1, targets.tokens[:, None])[:, 0]
    at_unit = unit_logits(
        base_logits,
        latent_logits,
        torch.arange(len(targets), device=at_token.device),
        targets.units,
    )
    sampled = log_partition - at_token
    if settings.objective == "cross_entropy":
        folded, split = sampled, at_token - at_unit
    elif isinstance(split_target, OfferTarget):
        open_tokens = split_target.open
        folded = divergence(
            open_tokens.removed_from(teacher_logits),
            open_tokens.removed_from(folded_logits),
            banned,
            settings,
        )
        split = offered_divergence(
            base_logits,
            latent_logits,
            targets.tokens,
            folding.goes_on_from,
            folding.group[:, None] == folding.group,
            split_target,
            settings,
        )
    elif settings.objective == "truncated_kl":
        folded = divergence(teacher_logits, base_logits, nothing, settings)
        split = log_partition - at_unit
    else:
        soft = divergence(teacher_logits, folded_logits, banned, settings, log_partition)
        folded = torch.where(is_sampled, sampled, soft)
        split = _split(
            at_token, at_unit, base_logits, latent_logits, targets, settings, split_target
        )
    with torch.no_grad():
        agrees = banned.removed_from(teacher_logits).argmax(1) == folded_logits.argmax(1)
    return RowTerms(folded=folded, split=split, agrees=agrees)


def _split(
    at_token: Float[Tensor, " R"],
    at_unit: Float[Tensor, " R"],
    base_logits: Float[Tensor, "R V"],
    latent_logits: Float[Tensor, "R K"],
    targets: RowTargets,
    settings: DistillationSettings,
    target: SplitTarget | None,
) -> Float[Tensor, " R"]:
    if settings.split == "nll":
        return at_token - at_unit
    target = taken_units(targets) if target is None else target
    zeros = torch.zeros_like(at_token)
    if settings.split == "bernoulli":
        is_taken = target.units == targets.units[target.rows]
        taken = zeros.index_add(0, target.rows, (target.weights * is_taken).to(zeros))
        return binary_divergence(taken, at_unit - at_token, settings.split_temperature)
    logits = unit_logits(base_logits, latent_logits, target.rows, target.units)
    nats = target.weights.to(zeros) * (at_token[target.rows] - logits)
    return zeros.index_add(0, target.rows, nats)
