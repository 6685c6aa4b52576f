import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lar_lightning.mining.equivalence import (
    NUM_LATER,
    Occurrence,
    equivalent_realizations,
    occurrences_of,
    sampled,
    transition_divergences,
)
from lar_lightning.mining.realizations import (
    Segment,
    canonicalize,
    normal_form,
    proposed_classes,
)
from lar_lightning.models.next_token_scorer import MAX_DEPTH, TransformersScorer, open_scorer
from lar_lightning.tokenizer import encode_text
from lar_lightning.trajectories import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    Make = Callable[..., Trajectory]


@pytest.fixture(scope="module")
def scorer(tiny_checkpoint: Path) -> Iterator[TransformersScorer]:
    with open_scorer(tiny_checkpoint, batch_size=3) as scorer:
        yield scorer


@pytest.mark.parametrize(
    "texts",
    [
        (" return result\n", " Return  result  \n", " return\tresult\n\n"),
        ('"key": "value"', "'key': 'value'", '"key" : "value"', '"key":"value"'),
        ("a, b,", "a ,b,", "A,b,"),
    ],
)
def test_spelling_alone_does_not_part_a_class(texts: Sequence[str]) -> None:
    assert len({normal_form(text) for text in texts}) == 1


def test_other_words_lines_and_edges_part_classes() -> None:
    texts = ("return result", "return results", "return(result)", "return Result", "returnresult")
    edges = (" return result", "return result ", "return result,", "return result, ")
    edges += ("\nreturn result", "\n    return result", "return\nresult", "    return result")
    assert len({normal_form(text) for text in (*texts, *edges)}) == len(texts) + len(edges)


def test_most_frequent_then_shortest_then_first_is_canonical() -> None:
    segments = [(1, 2), (3, 4), (5, 6, 7), (8, 9), (2, 2), (4, 4), (0, 0)]
    texts = [" do it", " do  it", " Do it", "x", "'y'", '"y"', " \n"]
    by_count = proposed_classes(segments, texts, [3, 2, 9, 9, 1, 1, 9])
    assert by_count == {(5, 6, 7): ((1, 2), (3, 4)), (2, 2): ((4, 4),)}
    by_length = proposed_classes(segments, texts, [1] * 7)
    assert by_length == {(1, 2): ((3, 4), (5, 6, 7)), (2, 2): ((4, 4),)}


def test_a_segment_cut_otherwise_is_no_other_realization() -> None:
    segments = [(1, 2), (1, 2, 3), (0, 1, 2), (1,), (1, 3, 2)]
    texts = ["do it", "do  it", "Do it", "Do  it", "do   it"]
    assert proposed_classes(segments, texts, [9, 1, 1, 1, 1]) == {(1, 2): ((1, 3, 2),)}


def test_occurrences_are_found_in_actions_only_with_what_stands_around(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    trajectory = make_trajectory("return result return result", prompt="return result")
    ids = trajectory.token_ids.tolist()
    (span,) = trajectory.action_spans
    segment = tuple(encode_text(tiny_tokenizer, " result"))
    found = occurrences_of([segment, (498, 499)], [trajectory], max_context=5)
    places = [
        at for at in range(span.start, span.end) if tuple(ids[at : at + len(segment)]) == segment
    ]
    assert len(places) == 2
    assert found[498, 499] == []
    for occurrence, at in zip(found[segment], places, strict=True):
        end = at + len(segment)
        assert occurrence.context == tuple(ids[at - 5 : at])
        assert occurrence.continuation == tuple(ids[end : min(end + NUM_LATER, span.end)])


def test_the_same_contexts_are_sampled_in_any_order() -> None:
    occurrences = [Occurrence((number, number), (number % 3,)) for number in range(40)]
    chosen = sampled(occurrences, 7)
    shuffled = random.Random(0).sample(occurrences * 2, 80)
    assert sampled(shuffled, 7) == chosen
    assert len(set(chosen)) == 7


class Toy:
    """A policy over three tokens that only looks at the last token, or at the one before."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.table = np.log(np.asarray([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.2, 0.2, 0.6]]))

    def __call__(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        return self.table[[sequence[-self.lag] for sequence in sequences]].astype(np.float32)


NATS = 0.6 * np.log(0.6 / 0.3) + 0.3 * np.log(0.3 / 0.6)


@pytest.mark.parametrize(
    ("lag", "continuation", "expected"),
    [
        (1, (2, 2), (NATS, 0.0)),  # seen right after, forgotten later
        (2, (2, 2, 2, 2), (0.0, NATS / 4)),  # seen one token later
        (1, (), (NATS, NATS)),  # nothing follows
    ],
)
def test_divergences_are_those_of_a_policy_in_closed_form(
    lag: int, continuation: Segment, expected: tuple[float, float]
) -> None:
    occurrences = [Occurrence((2, 2), continuation), Occurrence((1, 2, 1), continuation)]
    after, later = transition_divergences(Toy(lag), occurrences, (2, 0), (2, 1))
    np.testing.assert_allclose(after, expected[0], atol=1e-6)
    np.testing.assert_allclose(later, expected[1], atol=1e-6)


def test_impossible_tokens_add_nothing_where_the_trajectory_rules_them_out() -> None:
    def score(sequences: Sequence[Sequence[int]]) -> np.ndarray:
        rows = [[0.0, -np.inf] if sequence[-1] else [-0.5, -1.0] for sequence in sequences]
        return np.asarray(rows, dtype=np.float32)

    after, _ = transition_divergences(score, [Occurrence((1,), ())], (1, 1), (1, 0))
    np.testing.assert_allclose(after, [0.5])
    after, _ = transition_divergences(score, [Occurrence((1,), ())], (1, 0), (1, 1))
    assert after[0] == np.inf  # the canonical one would rule out what the policy may do


def test_near_realizations_join_and_far_or_rare_ones_stay_alone() -> None:
    canonical, near, far, rare = (2, 1), (0, 1), (2, 0), (1, 1)
    occurrences = {
        segment: [Occurrence((2, number % 3, number), (2,)) for number in range(count)]
        for segment, count in ((near, 9), (far, 9), (rare, 3))
    }
    found = equivalent_realizations(
        Toy(1), {canonical: (near, far, rare, (0, 0))}, occurrences, epsilon=0.05, num_contexts=6
    )
    assert found.classes == {canonical: (near,)}
    (joined,) = found.accepted[canonical]
    assert (joined.num_contexts, joined.mean_divergence) == (6, 0.0)
    refused = {verdict.realization: verdict for verdict in found.refused[canonical]}
    assert refused.keys() == {far, rare, (0, 0)}
    assert refused[far].mean_divergence == pytest.approx(NATS, rel=1e-5)
    assert refused[rare].num_contexts == 3
    assert np.isnan(refused[0, 0].mean_divergence)


def test_few_contexts_where_it_matters_are_not_averaged_away() -> None:
    """One context in five is far from the canonical one; the mean alone would let it pass."""

    def score(sequences: Sequence[Sequence[int]]) -> np.ndarray:
        is_far = [sequence[0] == 0 and sequence[-1] == 0 for sequence in sequences]
        return np.log(np.where(np.asarray(is_far)[:, None], [[0.9, 0.1]], [[0.5, 0.5]]))

    occurrences = {(1, 0): [Occurrence((number % 5, number), ()) for number in range(20)]}
    options = {"epsilon": 0.08, "num_contexts": 20}
    strict = equivalent_realizations(score, {(1, 1): [(1, 0)]}, occurrences, **options)  # type: ignore[arg-type]
    assert not strict.classes
    (verdict,) = strict.refused[1, 1]
    assert verdict.mean_divergence < 0.08 < 4 * 0.08 < verdict.quantile_divergence
    lax = equivalent_realizations(
        score,
        {(1, 1): [(1, 0)]},
        occurrences,
        max_quantile_ratio=9.0,
        **options,  # type: ignore[arg-type]
    )
    assert lax.classes == {(1, 1): ((1, 0),)}


def test_batches_do_not_change_the_scores(scorer: TransformersScorer) -> None:
    """Other lengths, beginnings of each other near and far, and the same one twice."""
    draw = random.Random(0)
    base = [draw.randrange(500) for _ in range(60)]
    sequences = [base[:length] for length in (1, 2, 30, 33, 40, 40, 60, 60 - MAX_DEPTH)]
    sequences += [[draw.randrange(500) for _ in range(size)] for size in (5, 17, 3, 1, 44)]
    rows = scorer(sequences)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.exp(rows).sum(1), 1, atol=1e-4)
    with torch.inference_mode():
        for row, sequence in zip(rows, sequences, strict=True):
            logits = scorer.model(input_ids=torch.tensor([sequence])).logits[0, -1]
            np.testing.assert_allclose(row, logits.float().log_softmax(-1), atol=2e-5)


def test_empty_sequences_cannot_be_scored(scorer: TransformersScorer) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        scorer([[1], []])


def test_a_realization_is_equivalent_to_itself_only(
    scorer: TransformersScorer, make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    names = ("alpha", "bravo", "carol", "delta", "erika")
    trajectories = [make_trajectory(f"{name} return result\n{name}") for name in names]
    segment = tuple(encode_text(tiny_tokenizer, " return result"))
    other = tuple(encode_text(tiny_tokenizer, " numbers length"))
    occurrences = occurrences_of([segment], trajectories)
    found = equivalent_realizations(
        scorer, {segment: [segment], other: [segment]}, occurrences, epsilon=1e-4
    )
    assert found.classes == {segment: (segment,)}
    assert found.refused[other][0].mean_divergence > 1e-3


SEGMENTS = st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple)


@st.composite
def class_sets(draw: st.DrawFn) -> dict[Segment, list[Segment]]:
    """Disjoint classes over four tokens, whose members may contain and chain with each other."""
    segments = draw(st.lists(SEGMENTS, min_size=1, max_size=6, unique=True))
    classes: dict[Segment, list[Segment]] = {}
    for segment in segments:
        if classes and draw(st.booleans()):
            classes[draw(st.sampled_from(sorted(classes)))].append(segment)
        else:
            classes[segment] = []
    return classes


@settings(max_examples=300)
@given(classes=class_sets(), tokens=st.lists(st.integers(0, 4), max_size=16))
def test_canonical_form_is_its_own_canonical_form(
    classes: dict[Segment, list[Segment]], tokens: list[int]
) -> None:
    canonical = canonicalize(tokens, classes)
    assert canonicalize(canonical, classes) == canonical
    others = [other for members in classes.values() for other in members]
    windows = {tuple(tokens[at : at + size]) for at in range(len(tokens)) for size in (1, 2, 3)}
    if windows.isdisjoint(others):
        assert canonical == tokens


def test_longest_realization_from_the_left_is_replaced() -> None:
    classes = {(7, 8): [(1, 2), (1, 2, 3)], (5,): [(2, 3)]}
    assert canonicalize([0, 1, 2, 3, 2, 3, 1, 2], classes) == [0, 7, 8, 5, 7, 8]
    assert canonicalize([1, 7, 8, 3], classes) == [1, 7, 8, 3]


def test_a_replacement_may_complete_another_realization() -> None:
    assert canonicalize([4, 5], {(6,): [(5,)], (7,): [(4, 6)]}) == [7]


def test_classes_that_go_on_for_ever_leave_the_tokens_alone() -> None:
    growing = {(3, 1): [(2,)], (4, 2): [(1,)], (5,): [(9, 9)]}
    assert canonicalize([0, 9, 9], growing) == [0, 5]
    assert canonicalize(canonicalize([2, 0], growing), growing) == canonicalize([2, 0], growing)
