"""Next-token distributions of a checkpoint after given sequences, by Transformers.

Dimensions: B sequences, S positions, V vocabulary.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_DEPTH = 16
"""A sequence is read off a longer one that begins with it if at most this many tokens more
follow: so many of its last rows are projected."""


class TransformersScorer:
    """A loaded model that scores sequences in batches of like length."""

    def __init__(self, model: "PreTrainedModel", batch_size: int = 16) -> None:
        """Wrap a loaded model.

        Args:
            model: In evaluation mode.
            batch_size: Sequences that are read together.
        """
        self.model = model
        self.batch_size = batch_size

    def __call__(self, sequences: Sequence[Sequence[int]]) -> Float[np.ndarray, "B V"]:
        """Return log-probabilities, float32, of the token after each sequence of one or more."""
        if not all(len(sequence) for sequence in sequences):
            raise ValueError("`sequences` must each hold at least one token, got an empty one.")
        size = int(self.model.config.vocab_size)
        rows = np.empty((len(sequences), size), dtype=np.float32)
        groups = sorted(_groups([tuple(sequence) for sequence in sequences]).items(), key=_length)
        for first in range(0, len(groups), self.batch_size):
            batch = groups[first : first + self.batch_size]
            depth = max(len(ids) - length for ids, members in batch for length, _ in members) + 1
            read = self._read([ids for ids, _ in batch], depth)
            for row, (ids, members) in enumerate(batch):
                for length, index in members:
                    rows[index] = read[row, depth - 1 - (len(ids) - length)]
        return rows

    @torch.inference_mode()
    def _read(self, sequences: Sequence[Sequence[int]], depth: int) -> np.ndarray:
        """Return log-probabilities at the last `depth` positions of each sequence."""
        longest = max(len(sequence) for sequence in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, longest - len(sequence) :] = torch.as_tensor(sequence)
            mask[row, longest - len(sequence) :] = 1
        device = self.model.device
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(1) - 1).clamp_min(0).to(device),
            logits_to_keep=depth,
            use_cache=False,
        )
        return output.logits.float().log_softmax(-1).cpu().numpy()


def _groups(
    sequences: Sequence[tuple[int, ...]],
) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """Put sequences to one that begins with them: its ids, and (length, index) of its members."""
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    leader: tuple[int, ...] = ()
    # Backwards in lexicographic order a sequence comes after those that begin with it.
    for index in sorted(range(len(sequences)), key=lambda index: sequences[index], reverse=True):
        ids = sequences[index]
        if leader[: len(ids)] != ids or len(leader) - len(ids) >= MAX_DEPTH:
            leader = ids
        groups.setdefault(leader, []).append((len(ids), index))
    return groups


def _length(group: tuple[tuple[int, ...], list[tuple[int, int]]]) -> int:
    return len(group[0])


@contextmanager
def open_scorer(
    checkpoint: Path, *, batch_size: int = 16, dtype: torch.dtype = torch.float32
) -> Iterator[TransformersScorer]:
    """Load a checkpoint and free it afterwards.

    Args:
        checkpoint: An ordinary Hugging Face folder.
        batch_size: Sequences that are read together.
        dtype: Of the computation; bfloat16 alone makes divergences of a few thousandths of a nat.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    model.eval()
    if torch.cuda.is_available():
        model.cuda()
    try:
        yield TransformersScorer(model, batch_size)
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
