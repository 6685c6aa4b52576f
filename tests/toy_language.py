"""A language small enough to enumerate.

Strings over a, b, c that `d` ends, with random next-token tables.
"""

from collections.abc import Iterator
from itertools import product

import numpy as np
import torch
from torch import Tensor

from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.trajectories import Span, Trajectory

ALPHABET = "abcd"
END = "d"
LONGEST = 5
"""Letters before the end; the teacher is certain to end there."""


def ids(text: str) -> list[int]:
    return [ALPHABET.index(letter) for letter in text]


def vocabulary_of(*segments: str) -> LatentVocabulary:
    latents = [LatentAction(segment=tuple(ids(segment)), text=segment) for segment in segments]
    return LatentVocabulary(latents, base_size=len(ALPHABET))


class RandomTeacher:
    """log P(next token | prefix), drawn once for each prefix."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.tables: dict[str, Tensor] = {}

    def __call__(self, prefix: str) -> Tensor:
        if prefix not in self.tables:
            logits = self.random.normal(scale=1.5, size=len(ALPHABET))
            if len(prefix) == LONGEST:
                logits[:-1] = -1e4
            self.tables[prefix] = torch.tensor(logits, dtype=torch.float64).log_softmax(0)
        return self.tables[prefix]

    def log_probability(self, text: str) -> Tensor:
        return torch.stack(
            [self(text[:i])[ALPHABET.index(letter)] for i, letter in enumerate(text)]
        ).sum()


class RandomStudent:
    """Logits over units after a latent prefix, drawn once for each prefix of units."""

    def __init__(self, seed: int, num_units: int) -> None:
        self.random = np.random.default_rng(seed)
        self.num_units = num_units
        self.tables: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, prefix: tuple[int, ...]) -> Tensor:
        if prefix not in self.tables:
            logits = self.random.normal(scale=1.5, size=self.num_units)
            self.tables[prefix] = torch.tensor(logits, dtype=torch.float64)
        return self.tables[prefix]

    def log_probability(self, units: list[int]) -> Tensor:
        return torch.stack(
            [self(tuple(units[:i])).log_softmax(0)[unit] for i, unit in enumerate(units)]
        ).sum()


def strings() -> Iterator[str]:
    for length in range(LONGEST + 1):
        for letters in product("abc", repeat=length):
            yield "".join(letters) + END


def trajectory_of(text: str, *, is_finished: bool = True) -> Trajectory:
    """One observed token, then `text` as the action."""
    token_ids = np.asarray([ALPHABET.index(END), *ids(text)], dtype=np.int32)
    return Trajectory(
        trajectory_id=text,
        task_id=text,
        token_ids=token_ids,
        spans=(
            Span(role="user", start=0, end=1),
            Span(role="assistant", start=1, end=len(token_ids)),
        ),
        entropies=np.zeros(len(token_ids), dtype=np.float32),
        entropy_kind="exact",
        temperature=1.0,
        is_finished=is_finished,
    )
