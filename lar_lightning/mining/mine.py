"""From trajectories to a latent vocabulary: candidates, executability, selection, and the tokenizer's last word."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from lar_lightning.base_models import tokenizer_fingerprint
from lar_lightning.errors import SettingError
from lar_lightning.mining.candidates import Candidate, maximal_repeats, occurrences
from lar_lightning.mining.corpus import Corpus, corpus_of
from lar_lightning.mining.executability import (
    TextCorpus,
    binding_tokens,
    certain_share,
    is_stable_alone,
    tokenizer_differences,
    uncertain_positions,
)
from lar_lightning.mining.selection import Pick, select
from lar_lightning.settings import MiningSettings
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.tokenizer import decode
from lar_lightning.trajectories import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class MiningReport:
    """What one pass found, for people and for the JSON beside the vocabulary."""

    num_tokens: int
    """Action tokens mined."""
    num_candidates: int
    """Maximal repeats with enough support."""
    num_uncertain: int
    """Rejected: a decision inside too many occurrences."""
    num_unstable: int
    """Rejected: their text is tokenized otherwise, alone or somewhere in the corpus."""
    num_disputed: int
    """Taken back: the extended tokenizer cut a transcript otherwise than the ids."""
    entropy_kind: str
    """How the entropies of the trajectories were found."""


def mine(
    trajectories: Sequence[Trajectory], tokenizer: "PreTrainedTokenizerFast", settings: MiningSettings
) -> tuple[LatentVocabulary, MiningReport]:
    """Mine a latent vocabulary.

    Raises:
        SettingError: if no segment passes.
    """
    corpus = corpus_of(trajectories)
    texts = list(dict.fromkeys(decode(tokenizer, trajectory.token_ids) for trajectory in trajectories))
    repeats, certain = _certain_repeats(corpus, tokenizer, settings)
    stable = _stable(certain, tokenizer, TextCorpus(tokenizer, texts))
    num_disputed = 0
    while True:
        picks = select(corpus, stable, max_latents=settings.max_latents, min_support=settings.min_support)
        if not picks:
            raise SettingError(
                f"`mining` must leave at least one segment, got none of {len(repeats)} repeats in {len(corpus)} tokens "
                f"of {corpus.num_tasks} tasks ({len(certain)} certain, {len(stable)} stable). Roll out more, or lower "
                f"`mining.min_support` ({settings.min_support}) or raise `mining.max_entropy` ({settings.max_entropy})."
            )
        vocabulary = _vocabulary(picks, corpus, tokenizer, settings)
        _, _, guilty = tokenizer_differences(tokenizer, vocabulary, texts)
        if not guilty:
            break
        taken_back = {vocabulary.latents[unit - vocabulary.base_size].segment for unit in guilty}
        stable = [candidate for candidate in stable if candidate.segment not in taken_back]
        num_disputed += len(taken_back)
    report = MiningReport(
        num_tokens=len(corpus),
        num_candidates=len(repeats),
        num_uncertain=len(repeats) - len(certain),
        num_unstable=len(certain) - len(stable) - num_disputed,
        num_disputed=num_disputed,
        entropy_kind=" and ".join(sorted({trajectory.entropy_kind for trajectory in trajectories})),
    )
    return vocabulary, report


def _certain_repeats(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerFast", settings: MiningSettings
) -> tuple[list[Candidate], list[Candidate]]:
    """Find repeats between decisions, then hold them against all places where they stand."""
    uncertain = uncertain_positions(corpus, settings.max_entropy)
    binding = binding_tokens(tokenizer, corpus.tokens)
    after_binding = np.concatenate([[False], binding[:-1]])
    repeats = maximal_repeats(
        corpus,
        uncertain | binding | after_binding,
        max_length=settings.max_length,
        min_support=settings.min_support,
    )
    # Separators keep binding tokens apart, but a piece may consist of two or more only if none of them binds.
    uncertain_before = np.concatenate([[0], np.cumsum(uncertain)])
    order = np.argsort(corpus.tokens, kind="stable")
    firsts, counts = np.unique(corpus.tokens[order], return_counts=True)
    starts_of = dict(zip(firsts.tolist(), np.split(order, np.cumsum(counts)[:-1]), strict=True))
    spans = np.cumsum(corpus.starts)
    certain: list[Candidate] = []
    for repeat in repeats:
        length = len(repeat.segment)
        positions = occurrences(corpus.tokens, repeat.segment, starts_of[repeat.segment[0]])
        positions = positions[spans[positions] == spans[positions + length - 1]]
        if certain_share(uncertain_before, positions, length) >= settings.min_certain_share:
            support = len(np.unique(corpus.tasks[positions]))
            certain.append(Candidate(segment=repeat.segment, positions=positions, support=support))
    return repeats, certain


def _stable(
    candidates: Sequence[Candidate], tokenizer: "PreTrainedTokenizerFast", text_corpus: TextCorpus
) -> list[Candidate]:
    stable = []
    for candidate in candidates:
        text = decode(tokenizer, candidate.segment)
        if is_stable_alone(tokenizer, candidate.segment, text):
            if text_corpus.misaligned_share(text, len(candidate.segment)) == 0:
                stable.append(candidate)
    return stable


def _vocabulary(
    picks: Sequence[Pick], corpus: Corpus, tokenizer: "PreTrainedTokenizerFast", settings: MiningSettings
) -> LatentVocabulary:
    latents = [
        LatentAction(
            segment=pick.candidate.segment,
            text=decode(tokenizer, pick.candidate.segment),
            num_occurrences=len(pick.positions),
            support=pick.candidate.support,
            inner_entropy=_inner_entropy(corpus, pick),
        )
        for pick in picks
    ]
    return LatentVocabulary(
        latents,
        base_size=len(tokenizer),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        provenance={"mining": asdict(settings)},
    )


def _inner_entropy(corpus: Corpus, pick: Pick) -> float:
    inner = pick.positions[:, None] + np.arange(1, len(pick.candidate.segment))
    return round(float(corpus.entropies[inner].mean()), 4)
