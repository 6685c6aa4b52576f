"""Reading sequences that begin alike: what they share is computed once.

Samples of one task share its prompt, and every trajectory shares the chat template's beginning. The
shared tokens are read as one sequence whose keys and values all its members go on from; gradients
flow back through them, summed over members. The result is that of reading each sequence whole.

Dimensions: B trajectories, S positions, D hidden units.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_SAVING = 64
"""Fewest positions that must fall away for a group to be read on its own."""


@dataclass(frozen=True)
class Group:
    """Some sequences of a batch that begin with the same `num_shared` tokens."""

    members: list[int]
    num_shared: int


def groups_of(ids: Int[Tensor, "B S"], mask: Int[Tensor, "B S"]) -> list[Group]:
    """Split a batch into groups that share much; what shares too little is one group with 0."""
    lengths = mask.sum(1).tolist()
    remaining = list(range(len(ids)))
    groups: list[Group] = []
    alone: list[int] = []
    while remaining:
        first, *others = remaining
        differs = (ids[others] != ids[first]).int()
        common = torch.where(differs.any(1), differs.argmax(1), ids.shape[1]).tolist()
        # Each keeps a token of its own, so that no sequence ends within the shared part.
        limits = [min(lengths[first], lengths[other]) - 1 for other in others]
        shared = sorted(zip(map(min, common, limits), others, strict=True), reverse=True)
        savings = [length * count for count, (length, _) in enumerate(shared, start=1)]
        best = max(savings, default=0)
        members = [first]
        if best >= LEAST_SAVING:
            count = savings.index(best) + 1
            members += sorted(other for _, other in shared[:count])
            groups.append(Group(members, shared[count - 1][0]))
        else:
            alone.append(first)
        remaining = [row for row in remaining if row not in members]
    return [*groups, Group(alone, 0)] if alone else groups


def read(
    model: "PreTrainedModel",
    ids: Int[Tensor, "B S"],
    mask: Int[Tensor, "B S"],
    *,
    first_trained: int | None = None,
    is_whole: bool = False,
) -> Float[Tensor, "B S D"]:
    """Return the last hidden states; what stands where padding is means nothing.

    Args:
        model: A causal language model; its output matrix is not used.
        ids: Of units.
        mask: 0 for padding, which is on the right.
        first_trained: Where only embeddings of ids from here on are trained, positions before the
            first of them are constant and are read without gradient.
        is_whole: Read in one call, whatever is shared: all processes call a sharded model equally
            often.
    """
    if is_whole:
        backbone = getattr(model, model.base_model_prefix)
        return backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    # Each sequence comes by the length of its group.
    parts = [
        (group, _read_group(model, ids[group.members], mask[group.members], group, first_trained))
        for group in groups_of(ids, mask)
    ]
    hidden = parts[0][1].new_zeros(*ids.shape, parts[0][1].shape[2])
    for group, states in parts:
        hidden = hidden.index_put(
            (
                torch.tensor(group.members, device=ids.device)[:, None],
                torch.arange(states.shape[1], device=ids.device),
            ),
            states,
        )
    return hidden


def _read_group(
    model: "PreTrainedModel", ids: Tensor, mask: Tensor, group: Group, first_trained: int | None
) -> Tensor:
    from transformers import DynamicCache

    backbone = getattr(model, model.base_model_prefix)
    length = int(mask.sum(1).max())
    ids, mask = ids[:, :length], mask[:, :length]
    num_constant = 0 if first_trained is None else _first_place(ids >= first_trained)
    if not num_constant and not group.num_shared:
        return backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    cache = DynamicCache()  # without a configuration: keeps all keys, also behind a sliding window
    parts = []
    for start, end in pairwise(sorted({0, num_constant, group.num_shared, length})):
        num_rows = 1 if start < group.num_shared else len(ids)
        if start and start == group.num_shared:
            cache.batch_repeat_interleave(num_rows)
        with torch.no_grad() if start < num_constant else nullcontext():
            states = backbone(
                input_ids=ids[:num_rows, start:end],
                attention_mask=mask[:num_rows, :end],
                position_ids=torch.arange(start, end, device=ids.device)[None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        parts.append(states.expand(len(ids), -1, -1))
    return torch.cat(parts, 1)


def _first_place(found: Bool[Tensor, "B S"]) -> int:
    """Return the first position at which any sequence has it; the length if none has."""
    places = found.any(0).nonzero()
    return int(places[0]) if len(places) else found.shape[1]
