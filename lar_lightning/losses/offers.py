"""The split term where the student wrote the text: latents on offer, and what the teacher says.

A latent is *on offer* at a row if the text that follows is its segment, at least up to its last
token. One teacher pass over the text then gives the probability of the whole segment, given its
first token v, whether the student took the latent, spelled it or left it before the last token:

    t = P_T(rest of the segment | text so far, v)

In leftmost-longest code this is the probability that the unit which begins there is the latent, or
one whose segment goes on from it: a segment that is completed is abbreviated. So t meets

    p = sum of p_S(z') over latents z' that go on from the segment, itself included, / p~_S(v)

and an offer's term is the divergence of (p, 1 - p) from (t, 1 - t). It asks for no counterfactual,
and it is 0 exactly where p = t; taken over all offers this fixes the student's choice among the
units that begin with v. What the student chose decides only which offers are met, never their
target: the trap of a target known only where the latent was taken (see `alignment`) is not here.

Dimensions: R rows in the loss, V base tokens, K latents, D hidden units, N path rows, O offers, W
open tokens of all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from lar_lightning.alignment import Pending
from lar_lightning.losses.divergences import NEVER, Banned, divergence, log_complement
from lar_lightning.segments import LatentVocabulary, TrieNode
from lar_lightning.settings import DistillationSettings


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One latent that could be taken where a unit begins; positions count the action's tokens."""

    unit: int
    """Index of the unit that begins there."""
    latent: int
    start: int
    """Position of the segment's second token."""
    end: int
    """Position of its last token, which may be the first after the text."""


def find_offers(
    vocabulary: LatentVocabulary,
    tokens: Sequence[int],
    edges: Sequence[int],
    pendings: Sequence[Pending],
) -> list[Offer]:
    """Find all offers of one action, unit by unit.

    A unit whose first token goes on towards a pending latent has none: its text is conditioned on
    something beyond that token.

    Args:
        vocabulary: Of the latents.
        tokens: Of the action.
        edges: Where its units begin.
        pendings: What is excluded there.
    """
    offers: list[Offer] = []
    for unit, (edge, pending) in enumerate(zip(edges, pendings, strict=True)):
        node: TrieNode | None = vocabulary.trie.children.get(tokens[edge])
        position = edge + 1
        if tokens[edge] in pending.banned | pending.deep:
            continue
        while node is not None:
            offers += [
                Offer(unit=unit, latent=child.latent, start=edge + 1, end=position)
                for child in node.children.values()
                if child.latent is not None
            ]
            if position == len(tokens):
                break
            node, position = node.children.get(tokens[position]), position + 1
    return offers


@torch.no_grad()
def rest_log_probabilities(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    tokens: Int[Tensor, " N"],
    starts: Int[Tensor, " O"],
    ends: Int[Tensor, " O"],
    last_tokens: Int[Tensor, " O"],
    *,
    rows_per_chunk: int = 64,
) -> Float[Tensor, " O"]:
    """Return log t of each offer.

    Args:
        hidden: The teacher's at the rows that predict the offers' rests, each rest's in a run.
        head: The teacher's output matrix.
        tokens: The text's token behind each row.
        starts: Row of each offer that predicts its segment's second token.
        ends: Row that predicts its last.
        last_tokens: The segment's last token.
        rows_per_chunk: Rows projected at a time.
    """
    of_text = torch.zeros(len(tokens) + 1, dtype=torch.float64, device=hidden.device)
    of_last = torch.zeros(len(ends), dtype=torch.float64, device=hidden.device)
    for start in range(0, len(tokens), rows_per_chunk):
        rows = slice(start, min(start + rows_per_chunk, len(tokens)))
        logits = functional.linear(hidden[rows].to(head.dtype), head)
        log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)
        of_text[rows.start + 1 : rows.stop + 1] = log_p.gather(1, tokens[rows, None])[:, 0].double()
        (here,) = torch.where((ends >= rows.start) & (ends < rows.stop))
        of_last[here] = log_p[ends[here] - rows.start, last_tokens[here]].double()
    # In double precision: the sum over a rest is a difference of two sums over all rows.
    up_to = of_text.cumsum(0)
    return up_to[ends] - up_to[starts] + of_last


@dataclass(frozen=True, kw_only=True, eq=False)
class OfferTarget:
    """What the rows of trajectories that the student wrote are held against, beside the teacher."""

    rows: Int[Tensor, " O"]
    """Index into the rows of the loss, ascending."""
    latents: Int[Tensor, " O"]
    log_probabilities: Float[Tensor, " O"]
    """log t."""
    open_rows: Int[Tensor, " W"]
    """Index into the rows of the loss, ascending."""
    open_tokens: Int[Tensor, " W"]
    """Base tokens whose probability depends on a pending latent further on."""

    def chunk(self, start: int, end: int) -> "OfferTarget":
        """Return what belongs to rows start..end."""
        ends = torch.tensor([start, end], device=self.rows.device)
        low, high = torch.searchsorted(self.rows, ends).tolist()
        first, last = torch.searchsorted(self.open_rows, ends).tolist()
        return OfferTarget(
            rows=self.rows[low:high] - start,
            latents=self.latents[low:high],
            log_probabilities=self.log_probabilities[low:high],
            open_rows=self.open_rows[first:last] - start,
            open_tokens=self.open_tokens[first:last],
        )

    @property
    def open(self) -> Banned:
        """Open tokens, to be removed from teacher and student alike."""
        return Banned(rows=self.open_rows, tokens=self.open_tokens)


def offered_divergence(
    base_logits: Float[Tensor, "R V"],
    latent_logits: Float[Tensor, "R K"],
    first_tokens: Int[Tensor, " R"],
    goes_on_from: Bool[Tensor, "K K"],
    begins_like: Bool[Tensor, "K K"],
    target: OfferTarget,
    settings: DistillationSettings,
) -> Float[Tensor, " R"]:
    """Return the sum of the terms of each row's offers.

    Args:
        base_logits: The student's for base tokens, in fp32.
        latent_logits: The student's for latents, in fp32.
        first_tokens: v, the token that follows each row.
        goes_on_from: True at (z, z') where the segment of z' begins with that of z.
        begins_like: True at (z, z') where both begin with the same token.
        target: The rows' offers.
        settings: Form of the divergence.
    """
    none = Banned(rows=target.rows[:0], tokens=target.rows[:0])
    latents = latent_logits[target.rows]
    explicit = base_logits[target.rows, first_tokens[target.rows]]
    is_taken = goes_on_from[target.latents]
    is_other = begins_like[target.latents] & ~is_taken
    taken = latents.masked_fill(~is_taken, NEVER).logsumexp(1)
    others = latents.masked_fill(~is_other, NEVER)
    not_taken = torch.cat([explicit[:, None], others], 1).logsumexp(1)
    log_t = target.log_probabilities.to(latents.dtype)
    teacher = torch.stack([log_t, log_complement(log_t)], 1)
    nats = divergence(teacher, torch.stack([taken, not_taken], 1), none, settings)
    return torch.zeros_like(base_logits[:, 0]).index_add(0, target.rows, nats)
