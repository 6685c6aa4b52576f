"""Which latents each stage has: the most certain first, so a stage is a beginning of the list."""

from collections.abc import Sequence
from itertools import pairwise

from lar_lightning.automaton import build_automaton
from lar_lightning.errors import SettingError
from lar_lightning.mining.corpus import Corpus
from lar_lightning.mining.coverage import rate
from lar_lightning.segments import LatentVocabulary


def sizes_by_share(num_latents: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Return the number of latents at each share of all, at least one.

    Raises:
        SettingError: if shares do not grow, or two of them give one size.
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise SettingError(f"`shares` must be numbers above 0 and up to 1, got {tuple(shares)}.")
    sizes = tuple(max(round(num_latents * share), 1) for share in shares)
    _check_growth("shares", shares, sizes, num_latents)
    return sizes


def sizes_by_rate(
    vocabulary: LatentVocabulary, corpus: Corpus, rates: Sequence[float]
) -> tuple[int, ...]:
    """Return the fewest latents that reach each reparameterization rate on a corpus.

    Raises:
        SettingError: if a rate is beyond what all latents reach, or rates do not grow.
    """
    reached = rate(corpus, vocabulary.automaton)
    if not rates or not all(0 < wanted <= reached for wanted in rates):
        raise SettingError(
            f"`rates` must be above 0 and up to {reached:.3f}, which all {len(vocabulary)} latents "
            f"reach, got {tuple(rates)}. Lower them, or mine more latents."
        )
    sizes = tuple(num_for_rate(vocabulary, corpus, wanted) for wanted in rates)
    _check_growth("rates", rates, sizes, len(vocabulary))
    return sizes


def num_for_rate(vocabulary: LatentVocabulary, corpus: Corpus, wanted: float) -> int:
    """Return how many latents, the first ones, reach a rate."""
    low, high = 1, len(vocabulary)
    while low < high:
        middle = (low + high) // 2
        automaton = build_automaton(vocabulary.segments[:middle], vocabulary.base_size)
        if rate(corpus, automaton) >= wanted:
            high = middle
        else:
            low = middle + 1
    return low


def check_order(vocabulary: LatentVocabulary) -> None:
    """Refuse a vocabulary whose latents do not stand in the order of their entropy.

    Raises:
        SettingError: naming the first that is out of place.
    """
    known = [
        float("inf") if latent.inner_entropy is None else latent.inner_entropy
        for latent in vocabulary.latents
    ]
    for place, (before, after) in enumerate(pairwise(known)):
        if after < before:
            raise SettingError(
                "the latent vocabulary must stand in the order of inner entropy, the most certain "
                f"first, got {vocabulary.latents[place + 1].text!r} ({after} nats) behind "
                f"{vocabulary.latents[place].text!r} ({before}). Mine again."
            )


def _check_growth(
    name: str, wanted: Sequence[float], sizes: Sequence[int], num_latents: int
) -> None:
    if any(after <= before for before, after in pairwise(sizes)):
        raise SettingError(
            f"`{name}` must grow, each by a latent at least, got {tuple(wanted)}, which of "
            f"{num_latents} latents are {tuple(sizes)}. Take fewer stages."
        )
