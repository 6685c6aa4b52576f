"""Why a piece of text is a latent action, or is not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lar_lightning.mining.corpus import Corpus
from lar_lightning.mining.executability import Stability, texts_of
from lar_lightning.mining.mine import chosen_trajectories, marked_corpus
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import MiningSettings
from lar_lightning.tokenizer import decode, encode_text
from lar_lightning.trajectories import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def explain(
    text: str,
    trajectories: Sequence[Trajectory],
    tokenizer: "PreTrainedTokenizerFast",
    settings: MiningSettings,
    vocabulary: LatentVocabulary,
) -> list[str]:
    """Hold a text against every rule of mining.

    Args:
        text: As it stands in actions, with its spaces.
        trajectories: That the vocabulary was mined from.
        tokenizer: Of the base model.
        settings: That it was mined with.
        vocabulary: The result.

    Returns:
        One line for each rule, and the verdict last.
    """
    segment = encode_text(tokenizer, text)
    pieces = [decode(tokenizer, [token]) for token in segment]
    lines = [f"{text!r} is {len(segment)} tokens: {pieces}"]
    known = {latent.segment: latent for latent in vocabulary.latents}
    if tuple(segment) in known:
        latent = known[tuple(segment)]
        return [
            *lines,
            f"it is a latent action: rank {latent.rank}, {latent.num_occurrences} places in "
            f"{latent.support} tasks, entropy {latent.inner_entropy} nats",
        ]
    if len(segment) < 2:
        return [*lines, "it is one token already: nothing would be saved"]
    chosen = chosen_trajectories(trajectories, settings)
    corpus, parameters = marked_corpus(chosen, tokenizer, settings)
    places = places_of(corpus, segment)
    tasks = np.unique(corpus.tasks[places])
    lines.append(f"it stands in {len(places)} places of {len(tasks)} tasks")
    reasons: list[str] = []
    least = settings.least_support(corpus.num_tasks)
    if len(tasks) < least:
        told = f" of {corpus.num_tasks}, {least}" if settings.min_support < 1 else ""
        reasons.append(f"fewer tasks than `min_support` ({settings.min_support}{told})")
    if len(segment) > settings.max_length:
        reasons.append(f"longer than `max_length` ({settings.max_length} tokens)")
    inside = places[:, None] + np.arange(len(segment))
    for name, mask in (
        ("a digit, a special token or half a character", parameters.kinds),
        ("a match of a parameter pattern", parameters.patterns),
        ("a value of a slot", parameters.slots),
    ):
        share = float(mask[inside].any(1).mean()) if len(places) else 0.0
        if share == 1.0:
            reasons.append(f"it contains {name}")
        elif share:
            lines.append(f"in {share:.0%} of its places it contains {name}")
    certain = float((~corpus.has_decision[inside[:, 1:]].any(1)).mean()) if len(places) else 0.0
    lines.append(f"the policy is certain inside in {certain:.0%} of its places")
    if len(places) and certain < settings.min_certain_share:
        reasons.append(
            f"certain in less than `min_certain_share` ({settings.min_certain_share:.0%}) of them "
            f"at H_max {settings.max_entropy} nats"
        )
    stability = Stability(
        tokenizer, texts_of(trajectories, tokenizer), settings.max_misaligned_share
    )
    if not stability.admits(tuple(segment)):
        reasons.append(str(stability.refused[tuple(segment)]))
    if not reasons:
        reasons.append(_outdone(corpus, vocabulary, segment, places))
    return [*lines, *(f"not a latent action: {reason}" for reason in reasons)]


def places_of(corpus: Corpus, segment: Sequence[int]) -> np.ndarray:
    """Return where a segment stands in a corpus of base tokens."""
    places = np.flatnonzero(corpus.tokens == segment[0])
    places = places[places + len(segment) <= len(corpus)]
    for offset, token in enumerate(segment[1:], start=1):
        places = places[
            (corpus.tokens[places + offset] == token) & ~corpus.is_start[places + offset]
        ]
    return places


def _outdone(
    corpus: Corpus, vocabulary: LatentVocabulary, segment: Sequence[int], places: np.ndarray
) -> str:
    """Say what the vocabulary makes of the places instead."""
    units_before = vocabulary.encode(segment)
    marks = vocabulary.automaton.mark(corpus.tokens, corpus.starts)
    is_covered = (marks[places] != -1).mean()
    texts = [
        vocabulary.latents[unit - vocabulary.base_size].text
        for unit in units_before
        if vocabulary.is_latent(unit)
    ]
    made_of = f"; its own latents are {texts}" if texts else ""
    return (
        f"others saved more for the budget of {len(vocabulary)}: {is_covered:.0%} of its places "
        f"begin inside one, and it takes {len(units_before)} units{made_of}"
    )
