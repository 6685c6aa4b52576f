"""Which student row answers to which teacher row, and on what the latter is conditioned.

The teacher reads the expanded trajectory x_0..x_{T-1}, the student the latent one s_0..s_{S-1},
where unit s_j covers base tokens [a_j, b_j). The student row at position j predicts s_{j+1} and
pairs with the teacher row at position b_j - 1, which predicts x_{b_j}: both have read the same
text. Only units of action spans are predicted.

*Pending* (algorithm 4): leftmost-longest encoding looks ahead, so units already written exclude
some continuations. A latent that starts where an earlier unit starts, agrees with all that is
written since and is longer than that must not be completed, or it would have been taken. What is
left of it is its *rest*. Rests of one token become banned tokens of the row; where a longer rest
remains, the row's soft target is unknown without a counterfactual, and the row is *sampled*
(one-hot on the actual token, which is unbiased).

Dimensions: T base tokens, S units, R rows in the loss, P banned tokens of all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from lar_lightning.segments import LatentVocabulary, TrieNode
from lar_lightning.trajectories import ACTION, Trajectory


@dataclass(frozen=True, kw_only=True, eq=False)
class AlignedTrajectory:
    """A trajectory in both currencies, with its rows in the loss."""

    trajectory_id: str
    teacher_ids: Int[np.ndarray, " T"]
    student_ids: Int[np.ndarray, " S"]
    teacher_rows: Int[np.ndarray, " R"]
    """Positions in `teacher_ids`; row t predicts `teacher_ids[t + 1]`."""
    student_rows: Int[np.ndarray, " R"]
    """Positions in `student_ids`; row j predicts `student_ids[j + 1]`."""
    target_tokens: Int[np.ndarray, " R"]
    """v*: the base token that follows."""
    target_units: Int[np.ndarray, " R"]
    """u*: the unit that follows."""
    is_sampled: Bool[np.ndarray, " R"]
    """True where the soft target is unknown: one-hot on v*."""
    banned_rows: Int[np.ndarray, " P"]
    """Index into the rows, ascending."""
    banned_tokens: Int[np.ndarray, " P"]
    """Base tokens that cannot follow there, given what was not abbreviated before."""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """What the units before a position exclude there."""

    banned: frozenset[int]
    """Tokens that would complete an excluded latent at once."""
    deep: frozenset[int]
    """Tokens that would go on towards the completion of an excluded latent."""


NOTHING_PENDING = Pending(banned=frozenset(), deep=frozenset())


def pending_at_edges(
    vocabulary: LatentVocabulary, tokens: Sequence[int], units: Sequence[int]
) -> tuple[list[Pending], int | None]:
    """Find what is excluded at each unit edge of one span.

    Args:
        vocabulary: Whose leftmost-longest code `units` is.
        tokens: Base tokens of the span.
        units: Their code.

    Returns:
        One `Pending` for each unit, valid at its start; and the index of the first unit that
        starts a latent which the span's end leaves undecided (None if there is none).
    """
    edges = np.concatenate([[0], np.cumsum(vocabulary.lengths(units))]).astype(int).tolist()
    unit_at = {edge: index for index, edge in enumerate(edges)}
    nodes_at: list[list[TrieNode]] = [[] for _ in edges]
    first_undecided = None
    for index in range(len(units)):
        node, position = vocabulary.trie, edges[index]
        while position < len(tokens) and (child := node.children.get(tokens[position])) is not None:
            node, position = child, position + 1
            if position >= edges[index + 1] and node.children:
                if position in unit_at:
                    nodes_at[unit_at[position]].append(node)
                if position == len(tokens) and first_undecided is None:
                    first_undecided = index
    return [
        _pending(nodes) if nodes else NOTHING_PENDING for nodes in nodes_at[:-1]
    ], first_undecided


def _pending(nodes: Sequence[TrieNode]) -> Pending:
    following = [(token, child) for node in nodes for token, child in node.children.items()]
    banned = frozenset(token for token, child in following if child.latent is not None)
    # A rest that begins with a banned token is excluded already.
    return Pending(banned=banned, deep=frozenset(token for token, _ in following) - banned)


def align(vocabulary: LatentVocabulary, trajectory: Trajectory) -> AlignedTrajectory:
    """Encode a trajectory span by span and pair its rows.

    An unfinished last action leaves the code of its tail undecided where a longer latent could
    still have been completed; those rows are left out of the loss.
    """
    teacher_ids = trajectory.token_ids.astype(np.int64)
    student_ids: list[int] = []
    columns: dict[str, list[int]] = {
        name: [] for name in ("teacher", "student", "token", "unit", "sampled")
    }
    banned: list[tuple[int, int]] = []
    for span in trajectory.spans:
        tokens = teacher_ids[span.start : span.end].tolist()
        units = vocabulary.encode(tokens)
        if span.role == ACTION:
            is_open = not trajectory.is_finished and span.end == len(teacher_ids)
            edge = span.start
            pendings, first_undecided = pending_at_edges(vocabulary, tokens, units)
            num_decided = first_undecided if is_open and first_undecided is not None else len(units)
            for index, (unit, length) in enumerate(
                zip(units, vocabulary.lengths(units), strict=True)
            ):
                if index >= num_decided:
                    break
                if edge > 0:  # nothing predicts the very first token
                    pending = pendings[index]
                    banned += [(len(columns["unit"]), token) for token in sorted(pending.banned)]
                    columns["teacher"].append(edge - 1)
                    columns["student"].append(len(student_ids) + index - 1)
                    columns["token"].append(tokens[edge - span.start])
                    columns["unit"].append(unit)
                    columns["sampled"].append(bool(pending.deep))
                edge += length
        student_ids += units
    return AlignedTrajectory(
        trajectory_id=trajectory.trajectory_id,
        teacher_ids=teacher_ids,
        student_ids=np.asarray(student_ids, dtype=np.int64),
        teacher_rows=np.asarray(columns["teacher"], dtype=np.int64),
        student_rows=np.asarray(columns["student"], dtype=np.int64),
        target_tokens=np.asarray(columns["token"], dtype=np.int64),
        target_units=np.asarray(columns["unit"], dtype=np.int64),
        is_sampled=np.asarray(columns["sampled"], dtype=bool),
        banned_rows=np.asarray([row for row, _ in banned], dtype=np.int64),
        banned_tokens=np.asarray([token for _, token in banned], dtype=np.int64),
    )
