"""From trajectories to a latent vocabulary.

Decisions and parameters are marked, segments are searched, and the tokenizer has the last word.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from lar_lightning.automaton import build_automaton
from lar_lightning.base_models import tokenizer_fingerprint
from lar_lightning.errors import SettingError
from lar_lightning.mining.classes import merge_classes
from lar_lightning.mining.corpus import Corpus, corpus_of
from lar_lightning.mining.coverage import rate, usage_of
from lar_lightning.mining.equivalence import NextTokenScorer, Verdict
from lar_lightning.mining.executability import (
    Comparison,
    Stability,
    compare_with_tokenizer,
    marked,
    texts_of,
)
from lar_lightning.mining.parameters import Parameters
from lar_lightning.mining.search import SearchLimits, Segment, find_segments
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.settings import MiningSettings
from lar_lightning.tokenizer import decode
from lar_lightning.trajectories import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_DIFFERENT_SHARE = 1e-3
"""Largest share of units in which the extended tokenizer may differ from the ids (algorithm 3)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mined:
    """A latent vocabulary and how it came about."""

    vocabulary: LatentVocabulary
    corpus: Corpus
    """What was mined, with its marks."""
    parameters: Parameters
    stability: Stability
    comparison: Comparison
    """Of the extended tokenizer with the ids, over the mined texts."""
    refused_realizations: dict[Segment, tuple[Verdict, ...]]
    """By canonical segment: what is spelt like it but changes what the policy does next."""
    entropy_kind: str


def mine(
    trajectories: Sequence[Trajectory],
    tokenizer: "PreTrainedTokenizerFast",
    settings: MiningSettings,
    *,
    scorer: NextTokenScorer | None = None,
    is_quiet: bool = True,
) -> Mined:
    """Mine a latent vocabulary.

    Args:
        trajectories: Of training tasks; their order does not matter.
        tokenizer: Of the base model.
        settings: What may become a latent action.
        scorer: The policy, for `settings.epsilon` above 0.
        is_quiet: Without a progress bar.

    Raises:
        SettingError: if no segment passes.
    """
    chosen = chosen_trajectories(trajectories, settings)
    corpus, parameters = marked_corpus(chosen, tokenizer, settings)
    texts = texts_of(trajectories, tokenizer)
    stability = Stability(tokenizer, texts, settings.max_misaligned_share)
    limits = search_limits(settings, corpus.num_tasks)
    segments: list[Segment] = []
    while True:
        segments = find_segments(
            corpus,
            limits,
            base_size=len(tokenizer),
            is_admissible=stability.admits,
            kept=segments,
            is_quiet=is_quiet,
        )
        if not segments and settings.max_latents:
            raise _nothing_found(corpus, parameters, settings)
        vocabulary = _plain_vocabulary(segments, tokenizer)
        comparison = compare_with_tokenizer(tokenizer, vocabulary, texts)
        disputed = _disputed(vocabulary, comparison)
        if not disputed:
            break
        for segment in disputed:
            stability.refuse(segment)
        segments = [segment for segment in segments if segment not in disputed]
    classes, refused_realizations = {}, {}
    if scorer is not None and settings.epsilon > 0:
        segments, classes, refused_realizations = merge_classes(
            segments, corpus, chosen, tokenizer, scorer, settings.epsilon
        )
    return Mined(
        vocabulary=_described_vocabulary(segments, classes, corpus, tokenizer, settings),
        corpus=corpus,
        parameters=parameters,
        stability=stability,
        comparison=comparison,
        refused_realizations=refused_realizations,
        entropy_kind=" and ".join(sorted({trajectory.entropy_kind for trajectory in chosen})),
    )


def chosen_trajectories(
    trajectories: Sequence[Trajectory], settings: MiningSettings
) -> list[Trajectory]:
    """Return the trajectories whose actions are mined: those of `settings.temperature`."""
    chosen = [t for t in trajectories if settings.temperature in (None, t.temperature)]
    if not chosen:
        found = sorted({str(trajectory.temperature) for trajectory in trajectories})
        raise SettingError(
            f"`mining.temperature` must be one that was rolled out, got {settings.temperature}, "
            f"there are {', '.join(found)}. "
            "Change it, or add it to `rollouts.temperatures`."
        )
    return chosen


def marked_corpus(
    trajectories: Sequence[Trajectory],
    tokenizer: "PreTrainedTokenizerFast",
    settings: MiningSettings,
) -> tuple[Corpus, Parameters]:
    """Return the corpus of trajectories with its decisions and parameters marked."""
    return marked(
        corpus_of(trajectories, scaffold_weight=settings.scaffold_weight),
        tokenizer,
        max_entropy=settings.max_entropy,
        patterns=settings.parameter_patterns,
        min_values=settings.min_slot_values,
        max_share=settings.max_slot_share,
    )


def search_limits(settings: MiningSettings, num_tasks: int) -> SearchLimits:
    """Return the limits of the search that settings ask for among so many tasks."""
    support = settings.least_support(num_tasks)
    return SearchLimits(
        max_segments=settings.max_latents,
        min_support=support,
        max_length=settings.max_length,
        min_certain_share=settings.min_certain_share,
        min_used_support=support,
    )


def _disputed(vocabulary: LatentVocabulary, comparison: Comparison) -> set[Segment]:
    """Return the segments to take back so that the tokenizer agrees, the worst first."""
    excess = comparison.num_different - MAX_DIFFERENT_SHARE * comparison.num_units
    disputed: set[Segment] = set()
    for unit, count in sorted(comparison.guilty.items(), key=lambda item: (-item[1], item[0])):
        if excess <= 0:
            break
        disputed.add(vocabulary.latents[unit - vocabulary.base_size].segment)
        excess -= count
    return disputed


def _plain_vocabulary(
    segments: Sequence[Segment], tokenizer: "PreTrainedTokenizerFast"
) -> LatentVocabulary:
    latents = [LatentAction(segment=s, text=decode(tokenizer, s)) for s in segments]
    return LatentVocabulary(latents, base_size=len(tokenizer))


def _described_vocabulary(
    segments: Sequence[Segment],
    classes: dict[Segment, tuple[Segment, ...]],
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerFast",
    settings: MiningSettings,
) -> LatentVocabulary:
    """Count what each segment does beside the others, and order them by entropy.

    The first latents are then the most certain, and beginnings of the vocabulary raise the
    reparameterization rate step by step (paper 5.3).
    """
    usage = usage_of(corpus, build_automaton(segments, len(tokenizer)), len(segments))
    latents = [
        LatentAction(
            segment=segment,
            text=decode(tokenizer, segment),
            rank=rank,
            num_occurrences=int(usage.counts[rank]),
            support=int(usage.supports[rank]),
            inner_entropy=_known(usage.inner_entropies[rank]),
            realizations=classes.get(segment, ()),
        )
        for rank, segment in enumerate(segments)
    ]
    latents.sort(key=lambda latent: (_sortable(latent.inner_entropy), latent.rank))
    return LatentVocabulary(
        latents[: _num_for_rate(latents, corpus, len(tokenizer), settings)],
        base_size=len(tokenizer),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        provenance={"mining": asdict(settings)},
    )


def _num_for_rate(
    latents: Sequence[LatentAction], corpus: Corpus, base_size: int, settings: MiningSettings
) -> int:
    """Return how many latents, the most certain first, reach the wanted rate."""
    if settings.target_rate is None:
        return len(latents)
    low, high = 1, len(latents)
    while low < high:
        middle = (low + high) // 2
        segments = [latent.segment for latent in latents[:middle]]
        if rate(corpus, build_automaton(segments, base_size)) >= settings.target_rate:
            high = middle
        else:
            low = middle + 1
    return low


def _known(entropy: float) -> float | None:
    return None if np.isnan(entropy) else round(float(entropy), 4)


def _sortable(entropy: float | None) -> float:
    return float("inf") if entropy is None else entropy


def _nothing_found(
    corpus: Corpus, parameters: Parameters, settings: MiningSettings
) -> SettingError:
    size = max(len(corpus), 1)
    bound = f"{corpus.is_barrier.sum() / size:.0%} of them bind parameters"
    uncertain = f"{corpus.has_decision.sum() / size:.0%} are decisions"
    return SettingError(
        f"`mining` must leave at least one segment, got none in {len(corpus):,} tokens of "
        f"{corpus.num_tasks} tasks ({bound}, {uncertain}). Take more tasks, or lower "
        f"`mining.min_support` ({settings.min_support}), or raise `mining.max_entropy` "
        f"({settings.max_entropy}) or `mining.max_misaligned_share` "
        f"({settings.max_misaligned_share})."
    )
