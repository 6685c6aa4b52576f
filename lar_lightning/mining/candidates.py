"""Candidates: maximal repeats of the corpus, by a suffix array and its longest common prefixes.

A maximal repeat is a segment that occurs at least twice and loses occurrences when it is made
longer on either side. They are the intervals of the LCP array (Abouelhoda et al. 2004); there are
at most N of them, and memory is linear.

Dimensions: N tokens of the corpus, C candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pydivsufsort
from jaxtyping import Bool, Int
from numba import njit

from lar_lightning.mining.corpus import Corpus


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A repeated segment and where it begins."""

    segment: tuple[int, ...]
    positions: Int[np.ndarray, " P"]
    """Ascending positions in the corpus."""
    support: int
    """Distinct tasks."""


def maximal_repeats(
    corpus: Corpus,
    cuts: Bool[np.ndarray, " N"],
    *,
    max_length: int,
    min_support: int,
) -> list[Candidate]:
    """Return the maximal repeats of 2..max_length tokens that enough tasks support.

    Args:
        corpus: Action tokens.
        cuts: True at tokens that no segment may reach over from the left (a segment may begin
            there).
        max_length: Longest segment, in tokens; longer repeats count as their first tokens.
        min_support: Fewest distinct tasks.
    """
    separated, origins = _separated(corpus, cuts)
    suffixes = pydivsufsort.divsufsort(separated).astype(np.int64)
    common = np.asarray(pydivsufsort.kasai(separated, suffixes), dtype=np.int64)
    places = origins[suffixes]
    found: dict[tuple[int, ...], Candidate] = {}
    for length, low, high in _intervals(common, max_length):
        positions = places[low : high + 1]
        support = len(np.unique(corpus.tasks[positions]))
        if support < min_support or not _is_left_maximal(separated, suffixes[low : high + 1]):
            continue
        first = int(positions[0])
        segment = tuple(corpus.tokens[first : first + length].tolist())
        found[segment] = Candidate(segment=segment, positions=np.sort(positions), support=support)
    return list(found.values())


def _separated(
    corpus: Corpus, cuts: Bool[np.ndarray, " N"]
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"]]:
    """Put a separator of its own before every cut, so that no repeat contains one.

    -1 is a separator's origin.
    """
    at = np.flatnonzero(cuts | corpus.starts)
    dense = np.unique(corpus.tokens, return_inverse=True)[1].astype(np.int64) + len(at)
    separated = np.insert(dense, at, np.arange(len(at)))
    origins = np.insert(np.arange(len(corpus)), at, -1)
    return separated, origins


def _is_left_maximal(separated: Int[np.ndarray, " M"], suffixes: Int[np.ndarray, " P"]) -> bool:
    before = separated[
        suffixes - 1
    ]  # every piece has its separator before it, so no suffix of interest is the first
    return bool((before != before[0]).any())


def _intervals(common: Int[np.ndarray, " M"], max_length: int) -> Iterator[tuple[int, int, int]]:
    lengths, lows, highs = _lcp_intervals(np.minimum(common, max_length))
    yield from zip(lengths.tolist(), lows.tolist(), highs.tolist(), strict=True)


@njit(cache=True)
def _lcp_intervals(common: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All LCP intervals of two or more common tokens; common[i] belongs to suffixes i and i + 1."""
    size = len(common)
    lengths, lows, highs = (
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.empty(size, np.int64),
    )
    stack_length, stack_low = np.empty(size + 1, np.int64), np.empty(size + 1, np.int64)
    depth, count = 0, 0
    stack_length[0], stack_low[0] = 0, 0
    for i in range(size):
        value = common[i] if i < size - 1 else 0
        low = i
        while stack_length[depth] > value:
            if stack_length[depth] >= 2:
                lengths[count], lows[count], highs[count] = stack_length[depth], stack_low[depth], i
                count += 1
            low = stack_low[depth]
            depth -= 1
        if value > stack_length[depth]:
            depth += 1
            stack_length[depth], stack_low[depth] = value, low
    return lengths[:count], lows[:count], highs[:count]


def occurrences(
    tokens: Int[np.ndarray, " N"], segment: tuple[int, ...], starts_at: Int[np.ndarray, " P"]
) -> np.ndarray:
    """Return where `segment` stands among `starts_at`, where its first token does."""
    positions = starts_at[starts_at + len(segment) <= len(tokens)]
    for offset, token in enumerate(segment[1:], start=1):
        positions = positions[tokens[positions + offset] == token]
    return positions
