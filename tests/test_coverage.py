"""What a vocabulary saves, against slow counts; the curves and the report over it."""

import html
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mined_texts import LOOSE, loops
from test_automaton import naive_fewest, naive_units
from toy_corpora import BASE_SIZE, Segment, corpora, corpus_from, ids, letter_trajectory, letters

from lar_lightning.automaton import build_automaton
from lar_lightning.mining import mine
from lar_lightning.mining.corpus import Corpus, corpus_of
from lar_lightning.mining.coverage import Coverage, action_saving, coverage_of, rate, usage_of
from lar_lightning.mining.curves import (
    ENTROPY_LIMITS,
    first_tasks,
    saving_by_budget,
    saving_by_entropy,
)
from lar_lightning.mining.mine import search_limits
from lar_lightning.mining.report import (
    JSON_NAME,
    PAGE_NAME,
    describe,
    text_report,
    write_reports,
)
from lar_lightning.mining.search import SearchLimits
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.tokenizer import decode
from lar_lightning.trajectories import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    Make = Callable[..., Trajectory]

SEGMENTS = st.lists(
    st.text("abz", min_size=2, max_size=4).map(ids), min_size=1, max_size=6, unique=True
)


def vocabulary_from(segments: Sequence[Segment]) -> LatentVocabulary:
    latents = [
        LatentAction(segment=segment, text=letters(segment), rank=len(segments) - 1 - index)
        for index, segment in enumerate(segments)
    ]
    return LatentVocabulary(latents, base_size=BASE_SIZE)


@st.composite
def letter_trajectories(draw: st.DrawFn) -> list[Trajectory]:
    texts = draw(st.lists(st.lists(st.text("abz", max_size=12), max_size=3), max_size=5))
    return [
        letter_trajectory(f"task {index % 3}", *each, number=index)
        for index, each in enumerate(texts)
        if each
    ]


@given(trajectories=letter_trajectories(), segments=SEGMENTS)
def test_coverage_is_that_of_a_slow_count(
    trajectories: list[Trajectory], segments: list[Segment]
) -> None:
    counts: dict[str, int] = dict.fromkeys(
        (
            "action_tokens",
            "action_units",
            "fewest_action_units",
            "action_tokens_in_latents",
            "prompt_tokens",
            "prompt_units",
        ),
        0,
    )
    for trajectory in trajectories:
        for span in trajectory.spans:
            tokens = trajectory.token_ids[span.start : span.end].tolist()
            units = naive_units(segments, tokens, BASE_SIZE)
            kind = "action" if span.role == "assistant" else "prompt"
            counts[f"{kind}_tokens"] += len(tokens)
            counts[f"{kind}_units"] += len(units)
            if kind == "action":
                counts["fewest_action_units"] += naive_fewest(segments, tokens)
                counts["action_tokens_in_latents"] += len(tokens) - sum(
                    unit < BASE_SIZE for unit in units
                )
    vocabulary = vocabulary_from(segments)
    coverage = coverage_of(vocabulary, trajectories)
    assert asdict(coverage) == counts
    for scaffold_weight in (0.0, 0.5):
        corpus = corpus_of(trajectories, scaffold_weight=scaffold_weight)
        assert action_saving(corpus, vocabulary.automaton) == pytest.approx(coverage.action_saving)
        assert rate(corpus, vocabulary.automaton) == pytest.approx(coverage.rate)


def test_shares_of_nothing_are_none() -> None:
    coverage = coverage_of(vocabulary_from([(0, 1)]), [])
    assert coverage.action_saving == coverage.prompt_saving == coverage.rate == 0
    assert coverage.gap_to_fewest == 0


def test_shares_follow_from_the_counts() -> None:
    coverage = Coverage(
        action_tokens=10,
        action_units=6,
        fewest_action_units=5,
        action_tokens_in_latents=8,
        prompt_tokens=4,
        prompt_units=3,
    )
    assert coverage.action_saving == 0.4
    assert coverage.prompt_saving == 0.25
    assert coverage.rate == 0.8
    assert coverage.gap_to_fewest == pytest.approx(0.2)


@settings(max_examples=200)
@given(corpus=corpora(num_letters=2), segments=SEGMENTS, data=st.data())
def test_usage_is_that_of_a_slow_count(
    corpus: Corpus, segments: list[Segment], data: st.DataObject
) -> None:
    entropy = st.sampled_from([0.25, 0.5, 1.0, float("nan")])
    size = len(corpus)
    entropies = data.draw(st.lists(entropy, min_size=size, max_size=size))
    corpus = replace(corpus, entropies=np.asarray(entropies, dtype=np.float32))
    usage = usage_of(corpus, build_automaton(segments, BASE_SIZE), len(segments))
    places: list[list[int]] = [[] for _ in segments]
    edges = [*corpus.starts.tolist(), size]
    for start, end in itertools.pairwise(edges):
        at = start
        for unit in naive_units(segments, corpus.tokens[start:end].tolist(), BASE_SIZE):
            if unit >= BASE_SIZE:
                places[unit - BASE_SIZE].append(at)
            at += len(segments[unit - BASE_SIZE]) if unit >= BASE_SIZE else 1
    for index, (segment, at_places) in enumerate(zip(segments, places, strict=True)):
        assert usage.counts[index] == len(at_places)
        assert usage.supports[index] == len({int(corpus.tasks[at]) for at in at_places})
        assert usage.first_places[index] == min(at_places, default=-1)
        inner = [entropies[at + step] for at in at_places for step in range(1, len(segment))]
        known = [value for value in inner if not np.isnan(value)]
        expected = np.mean(known) if known else np.nan
        np.testing.assert_allclose(usage.inner_entropies[index], expected)


@settings(max_examples=50)
@given(
    trajectories=letter_trajectories(),
    held_out=letter_trajectories(),
    segments=st.lists(
        st.text("abz", min_size=2, max_size=4).map(ids), min_size=1, max_size=9, unique=True
    ),
)
def test_last_point_of_the_budget_is_the_whole_vocabulary(
    trajectories: list[Trajectory], held_out: list[Trajectory], segments: list[Segment]
) -> None:
    vocabulary = vocabulary_from(segments)
    points = saving_by_budget(vocabulary, corpus_of(trajectories), corpus_of(held_out))
    budgets = [point.limit for point in points]
    assert budgets[-1] == len(segments)
    assert budgets[:-1] == [1 << power for power in range(len(budgets) - 1)]
    assert [point.num_latents for point in points] == budgets
    assert points[-1].mined == coverage_of(vocabulary, trajectories).action_saving
    assert points[-1].held_out == coverage_of(vocabulary, held_out).action_saving
    best = build_automaton([segments[-1]], BASE_SIZE)
    assert points[0].mined == action_saving(corpus_of(trajectories), best)


def limits_of(min_support: int = 2) -> SearchLimits:
    return SearchLimits(
        max_segments=4,
        min_support=min_support,
        max_length=8,
        min_certain_share=0.8,
        min_used_support=0,
    )


def test_every_entropy_limit_is_mined_anew() -> None:
    """At the second of four letters the policy is uncertain, at 0.7 nats."""
    corpus = corpus_from(*((task, f"{own}abcd") for task, own in enumerate("jklmnopq")))
    entropies = np.where(corpus.tokens == 1, 0.7, 0.01).astype(np.float32)
    corpus = replace(corpus, entropies=entropies, has_decision=entropies > 99)
    points = saving_by_entropy(
        corpus, corpus, limits_of(), base_size=BASE_SIZE, is_admissible=lambda _: True
    )
    assert [point.limit for point in points] == list(ENTROPY_LIMITS)
    savings = {point.limit: point.mined for point in points}
    assert savings[0.5] == pytest.approx(2 / 5)
    assert savings[1.0] == pytest.approx(3 / 5)
    assert [point.mined for point in points] == sorted(savings.values())
    assert all(point.held_out == point.mined for point in points)


def test_there_is_no_curve_over_entropies_that_are_not_known() -> None:
    corpus = corpus_from((0, "abab"), (1, "abab"))
    unknown = replace(corpus, entropies=np.full(8, np.nan, dtype=np.float32))
    arguments = (unknown, unknown, limits_of())
    assert saving_by_entropy(*arguments, base_size=BASE_SIZE, is_admissible=lambda _: True) == []


@given(corpus=corpora(), max_tokens=st.integers(1, 40))
def test_beginnings_of_a_corpus_hold_whole_tasks(corpus: Corpus, max_tokens: int) -> None:
    part = first_tasks(corpus, max_tokens)
    assert part.tokens.tolist() == corpus.tokens[: len(part)].tolist()
    assert not set(part.tasks.tolist()) & set(corpus.tasks[len(part) :].tolist())
    assert len(part) > 0
    assert len(part) <= max_tokens or len(set(part.tasks.tolist())) == 1
    assert part.num_tasks == corpus.num_tasks
    assert len(part.is_barrier) == len(part.widths) == len(part)


def test_reports_hold_what_was_mined_and_every_text(
    tmp_path: Path, make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    trajectories, held_out = loops(make_trajectory), loops(make_trajectory)[:3]
    mined = mine(trajectories, tiny_tokenizer, LOOSE)
    description = describe(mined, trajectories, held_out, tiny_tokenizer, LOOSE)
    vocabulary = mined.vocabulary
    for name, each in (("mined", trajectories), ("held_out", held_out)):
        coverage = coverage_of(vocabulary, each)
        assert description["coverage"][name].items() >= asdict(coverage).items()
        assert description["by_budget"][-1][name] == pytest.approx(coverage.action_saving)
    assert [latent["text"] for latent in description["latents"]] == [
        latent.text for latent in vocabulary.latents
    ]
    for told, latent in zip(description["latents"], vocabulary.latents, strict=True):
        assert "".join(told["example"]) in "".join(
            decode(tiny_tokenizer, trajectory.token_ids.tolist()) for trajectory in trajectories
        )
        assert (told["count"], told["support"]) == (latent.num_occurrences, latent.support)
        assert told["saved"] == told["count"] * (told["num_tokens"] - 1)
    limits = [point["limit"] for point in description["by_entropy"]]
    assert limits == list(ENTROPY_LIMITS)
    assert search_limits(LOOSE, num_tasks=8).max_segments == LOOSE.max_latents

    write_reports(tmp_path, description, title="<tiny>")
    kept = json.loads((tmp_path / JSON_NAME).read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(description))
    page = (tmp_path / PAGE_NAME).read_text(encoding="utf-8")
    assert "<tiny>" not in page
    for latent in vocabulary.latents:
        assert all(html.escape(word, quote=False) in page for word in latent.text.split())
    told_lines = text_report(description)
    assert all(repr(latent.text) in told_lines for latent in vocabulary.latents)
    assert f"{len(vocabulary)} latent actions from 8 trajectories of 8 tasks" in told_lines


def test_texts_cannot_break_the_page(
    tmp_path: Path, make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    hostile = "</pre><script>return</script>"
    texts = [make_trajectory(f"{n}{hostile}{n}", task_id=str(n)) for n in "abcdefgh"]
    settings = replace(LOOSE, max_length=64, parameter_patterns=(), max_misaligned_share=1.0)
    mined = mine(texts, tiny_tokenizer, settings)
    assert any("script>" in latent.text for latent in mined.vocabulary.latents)
    description = describe(mined, texts, texts, tiny_tokenizer, settings)
    write_reports(tmp_path, description, title="tiny")
    page = (tmp_path / PAGE_NAME).read_text(encoding="utf-8")
    assert "<script>return" not in page
    assert json.loads((tmp_path / JSON_NAME).read_text()) == json.loads(json.dumps(description))


def test_report_without_held_out_trajectories_or_entropies(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    trajectories = [
        replace(t, entropies=np.full_like(t.entropies, np.nan), entropy_kind="none")
        for t in loops(make_trajectory)
    ]
    mined = mine(trajectories, tiny_tokenizer, LOOSE)
    description = describe(mined, trajectories, [], tiny_tokenizer, LOOSE)
    assert description["by_entropy"] == []
    assert description["coverage"]["held_out"]["action_saving"] == 0
    assert "entropy: none" in text_report(description)
