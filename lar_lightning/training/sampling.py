"""What the student writes: units sampled from the weights that are being trained.

Dimensions: B prompts, S positions, V base tokens, K latents, D hidden units.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from lar_lightning.models.student import Student
from lar_lightning.policies.transformers_engine import left_padded


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What was written after one prompt."""

    units: list[int]
    """With the unit that ends the turn, if it was reached."""
    is_finished: bool
    """False where the token limit cut it."""


@torch.no_grad()
def sample_units(
    student: Student,
    prompts: Sequence[Sequence[int]],
    generator: torch.Generator,
    *,
    stop_units: Collection[int],
    max_tokens: int = 256,
    temperature: float = 1.0,
) -> list[Sample]:
    """Continue prompts of units, all in one batch, with keys and values cached.

    Args:
        student: Read as it is trained, adapters included.
        prompts: Units before what is to be written.
        generator: On the CPU; of all chance. What is drawn for a prompt depends on its place in
            the batch.
        stop_units: That end a turn.
        max_tokens: A prompt is done when its units expand to as many base tokens.
        temperature: 0 is greedy.
    """
    device = student.heads.latent.device
    ids, mask = left_padded(prompts, device)
    positions, cache = (mask.cumsum(1) - 1).clamp_min(0), None
    stops = torch.tensor(sorted(stop_units), device=device)
    num_tokens = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    is_done, is_finished = (torch.zeros_like(num_tokens, dtype=torch.bool) for _ in range(2))
    written: list[Int[Tensor, " B"]] = []
    is_counted: list[Bool[Tensor, " B"]] = []
    # Trained weights are in fp32; they are projected in the precision of the frozen ones.
    heads = student.heads
    base_head = heads.base.to(heads.teacher.dtype)
    while not is_done.all():
        hidden, cache = student.student_hidden_after(ids, mask, positions, cache)
        units = _drawn(unit_logits(hidden, base_head, heads.latent), temperature, generator)
        written.append(units)
        is_counted.append(~is_done)
        length = student.unit_lengths[(units - student.base_size).clamp_min(-1)]
        num_tokens += length * ~is_done
        is_finished |= torch.isin(units, stops) & ~is_done
        is_done = is_finished | (num_tokens >= max_tokens)
        ids = units[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    num_units = torch.stack(is_counted).sum(0).tolist()
    all_units = torch.stack(written, 1).tolist()
    return [
        Sample(units=units[:count], is_finished=finished)
        for units, count, finished in zip(all_units, num_units, is_finished.tolist(), strict=True)
    ]


def cut_at_limit(
    student: Student, units: Sequence[int], stop_units: Collection[int], max_tokens: int
) -> Sample:
    """Cut units behind the one whose expansion reaches `max_tokens` base tokens."""
    lengths = student.unit_lengths.cpu()[(torch.tensor(units) - student.base_size).clamp_min(-1)]
    kept = list(units[: int((lengths.cumsum(0) < max_tokens).sum()) + 1])
    return Sample(units=kept, is_finished=kept[-1] in stop_units)


def unit_logits(
    hidden: Float[Tensor, "B D"], base_head: Float[Tensor, "V D"], latent_head: Float[Tensor, "K D"]
) -> Float[Tensor, "B V+K"]:
    """Return the logits of all units in fp32, projected as the loss projects them."""
    with torch.autocast(hidden.device.type, enabled=False):
        base = functional.linear(hidden.to(base_head.dtype), base_head).float()
        return torch.cat([base, functional.linear(hidden.float(), latent_head.float())], 1)


def _drawn(
    logits: Float[Tensor, "B V+K"], temperature: float, generator: torch.Generator
) -> Int[Tensor, " B"]:
    if temperature == 0:
        return logits.argmax(1)
    # One number a prompt from the CPU, so that every device draws alike; in double precision, in
    # which a sum over the vocabulary loses no unit.
    chance = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator).to(logits.device)
    up_to = (logits.double() / temperature).softmax(1).cumsum(1)
    drawn = torch.searchsorted(up_to, chance * up_to[:, -1:], right=True)
    return drawn[:, 0].clamp_max(logits.shape[1] - 1)
