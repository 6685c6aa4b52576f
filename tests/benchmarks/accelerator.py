"""One step of ours at the size of an 8B model on a CUDA device.

Random weights of Llama 3's shape in bf16, adapters of rank 16, one trajectory of 4,096 expanded
tokens of which a fifth falls away. *MFU* is the operations of matrix products and attention that a
step needs over its time and the speed at which this device multiplies bf16 matrices, both measured.
"""

import time
from statistics import median
from typing import Any

import numpy as np
import torch

from lar_lightning.alignment import align
from lar_lightning.batches import DistillationBatch, collate
from lar_lightning.losses import distillation_loss
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.student import Student
from lar_lightning.trajectories import ACTION, Span, Trajectory
from tests.benchmarks.contenders import RANK, FlopCounter

SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
SEGMENT, NUM_LATENTS, NUM_STEPS = 4, 64, 5


def batch_of(
    length: int, base_size: int, batch_size: int = 1, num_plain: int = 0
) -> tuple[LatentVocabulary, DistillationBatch]:
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
    return vocabulary, collate(aligned)


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


def measure(
    device: str = "cuda", shape: dict[str, int] = SHAPE, length: int = 4096
) -> dict[str, Any]:
    """Return speed, memory and MFU of a step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, tie_word_embeddings=False, dtype="bfloat16")  # type: ignore[arg-type]
    vocabulary, batch = batch_of(length, shape["vocab_size"])
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    student = Student(model, vocabulary, trainable="lora", lora_rank=RANK).to(device)
    batch = batch.to(torch.device(device))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        teacher = student.teacher_hidden(batch.teacher_ids, batch.teacher_mask).flatten(0, 1)
        hidden = student.student_hidden(batch.student_ids, batch.student_mask).flatten(0, 1)
        loss, _ = distillation_loss(
            teacher[batch.teacher_rows],
            hidden[batch.student_rows],
            student.heads,
            batch.targets,
            student.folding,
            rows_per_chunk=1024,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounter() as counter:
        step()
    step()
    seconds = median(_seconds(step, device) for _ in range(NUM_STEPS))
    peak = _matrix_speed(device)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "tokens_per_second": length / seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        "gflop_per_token": counter.total / length / 1e9,
        "matrix_tflop_per_second": peak / 1e12,
        "mfu": counter.total / seconds / peak,
        "limit_tokens_per_second": length * peak / counter.total,
    }


def _seconds(run: Any, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _matrix_speed(device: str, size: int = 8192) -> float:
    """Return the best of several measurements of a square product in bf16, in FLOP/s."""
    size = size if device == "cuda" else 512
    matrix = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    return 2 * size**3 / min(_seconds(lambda: matrix @ matrix, device) for _ in range(20))
