"""Greedy selection by marginal saving, re-counted after each pick (algorithm 2.4).

The corpus is kept as a current partition into units. A candidate's marginal saving is the number
of units that fall away where it stands on unit edges, so that a longer segment is also credited
where shorter picks already cover a part of it. Savings only shrink as picks accumulate where picks
do not nest, so a heap of stale savings that re-counts its top finds the best without re-counting
all (lazy evaluation).

Dimensions: N tokens of the corpus.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from lar_lightning.mining.candidates import Candidate
from lar_lightning.mining.corpus import Corpus


@dataclass(frozen=True, kw_only=True, eq=False)
class Pick:
    """A selected candidate and what it saved when it was picked."""

    candidate: Candidate
    saving: int
    """Units that fell away in the mined corpus."""
    positions: Int[np.ndarray, " P"]
    """Where it was put to use."""


class Partition:
    """The corpus cut into units."""

    def __init__(self, corpus: Corpus) -> None:
        """Begin with one unit a token."""
        self.corpus = corpus
        self.is_edge: Bool[np.ndarray, " N1"] = np.ones(len(corpus) + 1, dtype=bool)
        self._edges_before = np.arange(len(corpus) + 2)

    def usable(self, candidate: Candidate) -> Int[np.ndarray, " P"]:
        """Return occurrences on unit edges that save something and do not overlap."""
        length = len(candidate.segment)
        positions = candidate.positions
        on_edges = self.is_edge[positions] & self.is_edge[positions + length]
        positions = positions[on_edges & (self.savings(positions, length) > 0)]
        return without_overlap(positions, length)

    def savings(self, positions: Int[np.ndarray, " P"], length: int) -> Int[np.ndarray, " P"]:
        """Return how many units each occurrence would save."""
        return self._edges_before[positions + length] - self._edges_before[positions] - 1

    def merge(self, positions: Int[np.ndarray, " P"], length: int) -> None:
        """Make one unit of each of the given occurrences."""
        inner = (positions[:, None] + np.arange(1, length)).ravel()
        self.is_edge[inner] = False
        self._edges_before = np.concatenate([[0], np.cumsum(self.is_edge)])


def without_overlap(positions: Int[np.ndarray, " P"], length: int) -> Int[np.ndarray, " P"]:
    """Keep the leftmost of overlapping occurrences; `positions` ascend."""
    if len(positions) < 2 or (np.diff(positions) >= length).all():
        return positions
    kept, free_from = [], -1
    for position in positions.tolist():
        if position >= free_from:
            kept.append(position)
            free_from = position + length
    return np.asarray(kept, dtype=positions.dtype)


def select(
    corpus: Corpus,
    candidates: Sequence[Candidate],
    *,
    max_latents: int,
    min_support: int,
    is_admissible: Callable[[Candidate], bool],
) -> list[Pick]:
    """Pick up to `max_latents` candidates, each the best of what is left.

    A candidate whose remaining usable occurrences come from fewer than `min_support` tasks is
    passed over, and so is one that `is_admissible` refuses; it is only asked about candidates that
    would be picked.
    """
    partition = Partition(corpus)
    heap = [
        (-(len(candidate.segment) - 1) * len(candidate.positions), candidate.segment, index)
        for index, candidate in enumerate(candidates)
    ]
    heapq.heapify(heap)
    picks: list[Pick] = []
    while heap and len(picks) < max_latents:
        _, segment, index = heapq.heappop(heap)
        candidate = candidates[index]
        positions = partition.usable(candidate)
        if len(np.unique(corpus.tasks[positions])) < min_support:
            continue
        saving = int(partition.savings(positions, len(segment)).sum())
        if heap and saving < -heap[0][0]:
            heapq.heappush(heap, (-saving, segment, index))
            continue
        if not is_admissible(candidate):
            continue
        picks.append(Pick(candidate=candidate, saving=saving, positions=positions))
        partition.merge(positions, len(segment))
    return picks
