"""Training steps of small random models, measured: bytes by phase, operations, seconds.

Bytes are those that the allocator handed out and took back, as torch's profiler records them: what
an operation needs inside is in them, what Python or libraries hold is not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from lar_lightning.alignment import AlignedTrajectory, align
from lar_lightning.batches import DistillationBatch, collate
from lar_lightning.estimates.backbones import Backbone
from lar_lightning.estimates.workload import Workload
from lar_lightning.models.student import Student
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.settings import DistillationSettings
from lar_lightning.training.comparison import compare
from lar_lightning.trajectories import ACTION, Span, Trajectory

PHASES = ("forward", "backward", "optimizer")
LORA_RANK = 8
SEGMENT, NUM_LATENTS = 4, 64


class SmallStep:
    """One optimizer step of a student on one batch, in the order in which Lightning does it."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        trainable: Any,
        num_tokens: int,
        rows_per_chunk: int = 64,
        is_checkpointed: bool = False,
        batch_size: int = 1,
        num_plain: int = 0,
        lora_rank: int = LORA_RANK,
        device: str = "cpu",
    ) -> None:
        """Make a random model, a random batch and the optimizer."""
        torch.manual_seed(0)
        self.vocabulary, aligned = random_trajectories(
            num_tokens, backbone.vocabulary_size, batch_size, num_plain
        )
        with torch.device(device):
            teacher = random_model(backbone, torch.bfloat16) if trainable == "full" else None
            model = random_model(backbone, torch.bfloat16 if teacher is None else torch.float32)
        if is_checkpointed:
            checkpoint_layers(model)
        self.student = Student(
            model, self.vocabulary, trainable=trainable, lora_rank=lora_rank, teacher=teacher
        ).to(device)
        self.batch = collate(aligned).to(torch.device(device))
        self.trainable = trainable
        self.lora_rank = lora_rank
        self.rows_per_chunk = rows_per_chunk
        self.is_checkpointed = is_checkpointed
        self.trained = [item for item in self.student.parameters() if item.requires_grad]
        # As on a card, where this is the default.
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, foreach=True)

    def run(self) -> None:
        """Take a step."""
        with record_function("forward"):
            loss = loss_of(self.student, self.batch, self.rows_per_chunk)
        with record_function("backward"):
            self.optimizer.zero_grad()
            loss.backward()
        with record_function("optimizer"):
            self.optimizer.step()

    @property
    def workload(self) -> Workload:
        """The step in the numbers that an estimate takes."""
        return workload_of(
            self.student,
            self.batch,
            trainable=self.trainable,
            rows_per_chunk=self.rows_per_chunk,
            lora_rank=self.lora_rank,
            is_checkpointed=self.is_checkpointed,
        )

    @property
    def fixed_bytes(self) -> int:
        """Bytes of parameters and buffers."""
        tensors = [*self.student.parameters(), *self.student.buffers()]
        storages = {item.untyped_storage().data_ptr(): item.untyped_storage() for item in tensors}
        return sum(storage.nbytes() for storage in storages.values())


def workload_of(
    student: Student,
    batch: DistillationBatch,
    *,
    trainable: Any,
    rows_per_chunk: int,
    lora_rank: int = LORA_RANK,
    is_checkpointed: bool = False,
) -> Workload:
    """Describe a step by the numbers that an estimate takes."""
    num_units, num_tokens = batch.student_ids.shape[1], batch.teacher_ids.shape[1]
    is_latent = (batch.student_ids >= student.base_size).any(0)
    num_prompt = int(is_latent.nonzero()[0])
    return Workload(
        trainable=trainable,
        batch_size=len(batch.student_ids),
        num_tokens=num_tokens,
        num_prompt_tokens=num_prompt,
        units_per_token=(num_units - num_prompt) / (num_tokens - num_prompt),
        action_share=len(batch.targets) / batch.student_ids.numel(),
        rows_per_chunk=rows_per_chunk,
        num_latents=student.num_active,
        lora_rank=lora_rank,
        is_checkpointed=is_checkpointed,
        is_padded=not batch.student_mask.all(),
    )


def random_trajectories(
    length: int, base_size: int, batch_size: int = 1, num_plain: int = 0
) -> tuple[LatentVocabulary, list[AlignedTrajectory]]:
    """Return latents, and random trajectories of `length` tokens, a quarter of it prompt.

    The first `num_plain` tokens hold no latent.
    """
    random = np.random.default_rng(0)
    segments = random.integers(base_size, size=(NUM_LATENTS, SEGMENT))
    vocabulary = LatentVocabulary(
        [LatentAction(segment=tuple(map(int, s)), text=str(i)) for i, s in enumerate(segments)],
        base_size=base_size,
    )
    aligned = [
        align(vocabulary, _random_trajectory(random, length, base_size, segments, num_plain))
        for _ in range(batch_size)
    ]
    return vocabulary, aligned


def _random_trajectory(
    random: np.random.Generator, length: int, base_size: int, segments: np.ndarray, num_plain: int
) -> Trajectory:
    ids = random.integers(base_size, size=length)
    for start in range(num_plain, length, 15):  # 4 of 15 tokens become one unit
        ids[start : start + SEGMENT] = segments[random.integers(NUM_LATENTS)][: length - start]
    return Trajectory(
        trajectory_id="random",
        task_id="random",
        token_ids=ids.astype(np.int32),
        spans=(
            Span(role="user", start=0, end=length // 4),
            Span(role=ACTION, start=length // 4, end=length),
        ),
        entropies=np.full(length, np.nan, dtype=np.float32),
        entropy_kind="exact",
        temperature=1.0,
        is_finished=True,
    )


def loss_of(student: Student, batch: DistillationBatch, rows_per_chunk: int) -> torch.Tensor:
    """Return the loss of a batch, as the module computes it."""
    teacher = student.teacher_hidden(batch.teacher_ids, batch.teacher_mask).flatten(0, 1)
    hidden = student.student_hidden(batch.student_ids, batch.student_mask).flatten(0, 1)
    settings = DistillationSettings()
    loss, _ = compare((teacher, hidden), batch, student, settings, rows_per_chunk=rows_per_chunk)
    return loss


def random_model(backbone: Backbone, dtype: torch.dtype) -> Any:
    """Return a Llama of a shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape: dict[str, Any] = {
        "num_hidden_layers": backbone.num_layers,
        "hidden_size": backbone.hidden_size,
        "intermediate_size": backbone.feed_forward_size,
        "num_attention_heads": backbone.num_heads,
        "num_key_value_heads": backbone.num_key_heads,
        "head_dim": backbone.head_size,
        "vocab_size": backbone.vocabulary_size,
        "tie_word_embeddings": backbone.is_tied,
        "max_position_embeddings": 8192,
    }
    kind = (Qwen3Config, Qwen3ForCausalLM) if backbone.has_head_norms else None
    config_kind, model_kind = kind or (LlamaConfig, LlamaForCausalLM)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return model_kind(config_kind(**shape, dtype=str(dtype).removeprefix("torch.")))
    finally:
        torch.set_default_dtype(before)


def checkpoint_layers(model: Any) -> None:
    """Compute each layer again in the backward pass instead of keeping what it computed."""
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda *args, _forward=forward, **options: (
            checkpoint(_forward, *args, use_reentrant=False, **options)
            if torch.is_grad_enabled()
            else _forward(*args, **options)
        )


def measured_bytes(step: SmallStep, num_steps: int = 2) -> dict[str, int]:
    """Return the most bytes in use in each phase of the last of some steps, from the first on."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(num_steps):
            step.run()
    results: Any = profiler.profiler
    events = sorted(results.kineto_results.events(), key=lambda event: event.start_ns())
    last = {
        phase: max((event.start_ns(), event.end_ns()) for event in events if event.name() == phase)
        for phase in PHASES
    }
    in_use = step.fixed_bytes
    peaks: dict[str, int] = dict.fromkeys(PHASES, 0)
    for event in events:
        if event.name() != "[memory]":
            continue
        in_use += event.nbytes()
        for phase, (start, end) in last.items():
            if start <= event.start_ns() <= end:
                peaks[phase] = max(peaks[phase], in_use)
    return peaks


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: threads bring buffers of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
