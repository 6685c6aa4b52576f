from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_language import ids, trajectory_of, vocabulary_of

from lar_lightning.alignment import align, decision_of, padded, pending_at_edges
from lar_lightning.trajectories import Span

SEGMENTS = st.lists(st.text("abc", min_size=2, max_size=5), min_size=1, max_size=6, unique=True)


@given(segments=SEGMENTS, text=st.text("abc", max_size=30))
def test_paired_rows_have_read_the_same_text(segments: list[str], text: str) -> None:
    vocabulary = vocabulary_of(*segments)
    aligned = align(vocabulary, trajectory_of(text + "d"))
    for teacher_row, student_row in zip(aligned.teacher_rows, aligned.student_rows, strict=True):
        seen = vocabulary.expand(aligned.student_ids[: student_row + 1])
        assert seen == aligned.teacher_ids[: teacher_row + 1].tolist()


@given(segments=SEGMENTS, text=st.text("abc", max_size=30))
def test_every_action_unit_is_predicted_once(segments: list[str], text: str) -> None:
    vocabulary = vocabulary_of(*segments)
    aligned = align(vocabulary, trajectory_of(text + "d"))
    assert aligned.target_units.tolist() == vocabulary.encode(ids(text + "d"))
    assert aligned.target_tokens.tolist() == aligned.teacher_ids[aligned.teacher_rows + 1].tolist()


@given(segments=SEGMENTS, prefix=st.text("abc", max_size=12), token=st.sampled_from("abc"))
def test_a_token_is_banned_exactly_where_it_would_change_the_code_already_written(
    segments: list[str], prefix: str, token: str
) -> None:
    """Oracle: write the token and encode again."""
    vocabulary = vocabulary_of(*segments)
    units = vocabulary.encode(ids(prefix))
    # The pending state after a whole prefix is that at the start of one more, unrelated unit.
    pendings, _ = pending_at_edges(vocabulary, ids(prefix + "d"), [*units, 3])
    is_kept = vocabulary.encode(ids(prefix + token))[: len(units)] == units
    assert (ids(token)[0] in pendings[-1].banned) == (not is_kept)


@given(segments=SEGMENTS, text=st.text("abc", max_size=20))
def test_the_actual_token_is_never_banned(segments: list[str], text: str) -> None:
    aligned = align(vocabulary_of(*segments), trajectory_of(text + "d"))
    assert not (aligned.target_tokens[aligned.banned_rows] == aligned.banned_tokens).any()


@given(segments=SEGMENTS, text=st.text("abc", max_size=30))
def test_padded_rows_predict_from_the_position_of_their_teacher(
    segments: list[str], text: str
) -> None:
    vocabulary = vocabulary_of(*segments)
    aligned = align(vocabulary, trajectory_of(text + "d"))
    long = padded(aligned, vocabulary)
    assert len(long.student_ids) == len(long.teacher_ids)
    assert long.student_rows.tolist() == aligned.teacher_rows.tolist()
    kept = long.student_ids[long.student_rows].tolist()
    assert kept == aligned.student_ids[aligned.student_rows].tolist()


@pytest.mark.parametrize(
    ("text", "num_decided"), [("cab", 1), ("caba", 1), ("cabb", 3), ("cc", 2), ("cabab", 2)]
)
def test_rows_that_an_unfinished_action_leaves_undecided_are_left_out(
    text: str, num_decided: int
) -> None:
    """Latents `ab` and `abab`: a tail that could still become the longer one has no known code."""
    aligned = align(vocabulary_of("ab", "abab"), trajectory_of(text, is_finished=False))
    assert len(aligned.target_units) == num_decided


def test_turns_are_encoded_apart_and_observations_are_not_predicted() -> None:
    tokens = np.asarray(ids("ababab"), dtype=np.int32)
    spans = (
        Span(role="assistant", start=0, end=3),
        Span(role="tool", start=3, end=5),
        Span(role="assistant", start=5, end=6),
    )
    trajectory = replace(
        trajectory_of("abababd"), token_ids=tokens, spans=spans, entropies=np.zeros(6)
    )
    aligned = align(vocabulary_of("ab"), trajectory)
    assert aligned.student_ids.tolist() == [4, 0, 1, 0, 1]
    assert aligned.student_rows.tolist() == [0, 3]  # nothing predicts the very first unit
    assert aligned.teacher_rows.tolist() == [1, 4]


@given(segments=SEGMENTS, text=st.text("abc", max_size=16))
def test_decision_says_what_each_next_token_leads_to(segments: list[str], text: str) -> None:
    """Oracle: put the token there and encode again; `d`, in no segment, settles the rest."""
    vocabulary = vocabulary_of(*segments)
    tokens = ids(text + "d")
    units = vocabulary.encode(tokens)
    edges = np.cumsum([0, *vocabulary.lengths(units)]).tolist()
    for index in range(len(units)):
        decision = decision_of(vocabulary, tokens, edges, index)
        if decision is None:
            continue
        for token in ids("abcd"):
            other = vocabulary.encode([*tokens[: decision.position + 1], token, 3])
            expected = decision.completed.get(token, decision.fallback)
            assert other[: index + 1] == [*units[:index], expected]


@pytest.mark.parametrize(
    ("segments", "text", "decided"),
    [
        (("ab",), "abd", [(0, 0, {1: 4}, 0)]),
        (("ab",), "acd", [(0, 0, {1: 4}, 0)]),
        (("abc",), "abd", [(0, 1, {2: 4}, 0)]),
        (("abc",), "acd", []),  # it was decided where a longer rest was still open
        (("ab", "abc"), "abd", [(0, 1, {2: 5}, 4)]),
        (("ab", "ac"), "aad", [(0, 0, {1: 4, 2: 5}, 0), (1, 1, {1: 4, 2: 5}, 0)]),
        # There the unit before might still have become the longer latent.
        (("caa", "ab"), "cabd", [(0, 1, {0: 4}, 2)]),
        (("cabb", "ab"), "cabd", [(0, 2, {1: 4}, 2)]),
    ],
)
def test_decisions_by_hand(
    segments: tuple[str, ...], text: str, decided: list[tuple[int, int, dict[int, int], int]]
) -> None:
    aligned = align(vocabulary_of(*segments), trajectory_of(text))
    found = [
        (
            int(row),
            int(position) - 1,  # one observed token comes first
            {
                int(token): int(unit)
                for of, token, unit in zip(
                    aligned.completing_decisions,
                    aligned.completing_tokens,
                    aligned.completed_units,
                    strict=True,
                )
                if of == number
            },
            int(fallback),
        )
        for number, (row, position, fallback) in enumerate(
            zip(
                aligned.decision_rows,
                aligned.decision_positions,
                aligned.fallback_units,
                strict=True,
            )
        )
    ]
    assert found == decided
