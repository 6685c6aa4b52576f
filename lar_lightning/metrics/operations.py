"""Operations that a training step asks for, by the matrices of the model and the batch.

A product of (m, k) and (k, n) counts 2 m k n, attention's squares count in full. Each trajectory
counts as if it were read by itself, forward once by the teacher and once by the student, and
backward where gradients flow: what sharing prompts, caching or recomputing change is not seen.
That is the *model's* operations, so that their share of the peak tells how well time is used.
Layers of experts count as if all of them were used.

Dimensions: B trajectories, S positions.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lar_lightning.batches import DistillationBatch
from lar_lightning.models.student import Student


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What the operations of a model depend on."""

    linear: int
    """Parameters of the base model's linear layers, without the output matrix."""
    adapters: int
    head: int
    """Of the output matrix."""
    latent_head: int
    attention: int
    """Units of all queries of a position, in all layers."""
    base_size: int
    trains_base: bool
    trains_rows_alone: bool


def size_of(student: Student) -> ModelSize:
    """Count a student's matrices."""
    model: Any = student.model
    output = model.get_output_embeddings()
    sizes = {True: 0, False: 0}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not output:
            sizes["lora_" in name] += module.weight.numel()
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    hidden_size = student.rows.output_rows.shape[1]
    return ModelSize(
        linear=sizes[False],
        adapters=sizes[True],
        head=student.base_size * hidden_size,
        latent_head=student.rows.output_rows.numel(),
        attention=config.num_hidden_layers * config.num_attention_heads * head_size,
        base_size=student.base_size,
        trains_base=student.teacher is not None,
        trains_rows_alone=student.adapters is student.teacher is None,
    )


def step_operations(size: ModelSize, batch: DistillationBatch, *, is_cached: bool) -> Tensor:
    """Return the operations of learning from a batch.

    Args:
        size: Of the model.
        batch: Its trajectories.
        is_cached: The teacher's hidden states come from disk.
    """
    student = batch.student_mask.bool()
    units, num_rows = student.sum(1).double(), len(batch.targets)
    forward = _linear(size.linear + size.adapters, units) + _attention(size, units)
    if not is_cached:
        tokens = batch.teacher_mask.sum(1).double()
        forward = forward + _linear(size.linear, tokens) + _attention(size, tokens)
    learning = units
    if size.trains_rows_alone:  # nothing trained reaches what stands before the first latent
        is_behind = (batch.student_ids >= size.base_size).cumsum(1) > 0
        learning = (is_behind & student).sum(1).double()
    # Gradients of what a layer reads, everywhere; of its weights, where those are trained.
    per_layer = size.linear * (2 if size.trains_base else 1) + 2 * size.adapters
    backward = _linear(per_layer, learning) + 2 * _attention(size, learning)
    heads = 2 * num_rows * (size.head * (4 if size.trains_base else 3) + 3 * size.latent_head)
    return (forward + backward).sum() + heads


def _linear(parameters: int, positions: Tensor) -> Tensor:
    return 2 * parameters * positions


def _attention(size: ModelSize, positions: Tensor) -> Tensor:
    return 4 * size.attention * positions**2


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the speed of a matrix product on a device, in operations a second: best of several."""
    size = 1024 if device.type == "cpu" else 8192
    # Random: a card multiplies ones faster than it ever multiplies weights (877 against 785
    # TFLOP/s on an H200), since they take less power.
    matrix = torch.randn(size, size, device=device).to(dtype)
    best, begin = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        _ = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
