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

*Decisions*: which of the units that begin with the same token is taken is decided further on in the
text. At the first teacher row where the very next token decides it, whatever that token is, the
teacher's own distribution gives the expectation of the choice: a target with less variance than the
choice itself, and as unbiased (each trajectory term may be replaced by its expectation at a
stopping time). The probability of a whole segment, given its first token, may not stand in for
this: known only where the latent was taken, it makes the student converge to its square.

Dimensions: T base tokens, S units, R rows in the loss, P banned tokens and N pending latents of all
rows, Q decisions, L tokens that would complete a latent there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

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
    num_since_latent: Int[np.ndarray, " R"]
    """Units read since the last latent; -1 where there was none yet, 0 directly behind one."""
    pending_rows: Int[np.ndarray, " N"]
    """Index into the rows, ascending: one entry for each latent that is pending at a row."""
    pending_starts: Int[np.ndarray, " N"]
    """The row where it could have been taken."""
    pending_units: Int[np.ndarray, " N"]
    pending_tokens: Int[np.ndarray, " N"]
    """The next base token of its rest."""
    decision_rows: Int[np.ndarray, " Q"]
    """Index into the rows, ascending: those whose choice of unit is soft."""
    decision_positions: Int[np.ndarray, " Q"]
    """Positions in `teacher_ids`, like `teacher_rows`."""
    fallback_units: Int[np.ndarray, " Q"]
    """The unit taken if none of the completing tokens follows."""
    completing_decisions: Int[np.ndarray, " L"]
    """Index into the decisions, ascending."""
    completing_tokens: Int[np.ndarray, " L"]
    completed_units: Int[np.ndarray, " L"]
    """The latent taken if that token follows."""


COLUMNS = [
    field.name
    for field in fields(AlignedTrajectory)
    if field.name not in ("trajectory_id", "teacher_ids", "student_ids")
]


@dataclass(frozen=True, kw_only=True)
class Pending:
    """What the units before a position exclude there."""

    banned: frozenset[int]
    """Tokens that would complete an excluded latent at once."""
    deep: frozenset[int]
    """Tokens that would go on towards the completion of an excluded latent."""
    latents: tuple[tuple[int, int, int], ...] = ()
    """Each of them: the unit where it begins, its own index, and the next token of its rest."""


NOTHING_PENDING = Pending(banned=frozenset(), deep=frozenset())


def pending_at_edges(
    vocabulary: LatentVocabulary, tokens: Sequence[int], units: Sequence[int]
) -> tuple[list[Pending], int | None]:
    """Find what is excluded at each unit edge of one span.

    Args:
        vocabulary: Of the units.
        tokens: Base tokens of the span.
        units: Their leftmost-longest code. Of other units with the same text, each excludes what it
            would in the code, until the text completes a latent that it should have been.

    Returns:
        One `Pending` for each unit, valid at its start; and the index of the first unit that
        starts a latent which the span's end leaves undecided (None if there is none).
    """
    edges = np.concatenate([[0], np.cumsum(vocabulary.lengths(units))]).astype(int).tolist()
    unit_at = {edge: index for index, edge in enumerate(edges)}
    nodes_at: list[list[tuple[int, TrieNode]]] = [[] for _ in edges]
    first_undecided = None
    for index in range(len(units)):
        node, position = vocabulary.trie, edges[index]
        while position < len(tokens) and (child := node.children.get(tokens[position])) is not None:
            node, position = child, position + 1
            if position > edges[index + 1] and node.latent is not None:
                break  # not in leftmost-longest code
            if position >= edges[index + 1] and node.children:
                if position in unit_at:
                    nodes_at[unit_at[position]].append((index, node))
                if position == len(tokens) and first_undecided is None:
                    first_undecided = index
    return [
        _pending(nodes) if nodes else NOTHING_PENDING for nodes in nodes_at[:-1]
    ], first_undecided


def _pending(nodes: Sequence[tuple[int, TrieNode]]) -> Pending:
    following = [
        (start, token, child) for start, node in nodes for token, child in node.children.items()
    ]
    banned = frozenset(token for _, token, child in following if child.latent is not None)
    return Pending(
        banned=banned,
        # A rest that begins with a banned token is excluded already.
        deep=frozenset(token for _, token, _ in following) - banned,
        latents=tuple(
            (start, latent, token)
            for start, token, child in following
            for latent in latents_below(child)
        ),
    )


def latents_below(node: TrieNode) -> Iterator[int]:
    """Yield the latents whose segments begin with what a node stands for."""
    if node.latent is not None:
        yield node.latent
    for child in node.children.values():
        yield from latents_below(child)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Where the next token decides which unit is taken, and what each token leads to."""

    position: int
    """Of the row in the span whose next token decides."""
    completed: dict[int, int]
    """The latent's unit by the token that completes it."""
    fallback: int
    """The unit for all other tokens."""


def decision_of(
    vocabulary: LatentVocabulary, tokens: Sequence[int], edges: Sequence[int], index: int
) -> Decision | None:
    """Find where the choice of one unit is decided.

    None where it is certain from the first token on, where it was decided at a row that left some
    outcome open, or where an earlier unit might still have become a longer one.

    Args:
        vocabulary: Whose leftmost-longest code the units are.
        tokens: Base tokens of the span.
        edges: Where its units begin.
        index: Of the unit.
    """
    position = edges[index]
    node = vocabulary.trie.children.get(tokens[position])
    fallback = tokens[position]
    while node is not None:
        position += 1
        if position == len(tokens):
            return None
        if not any(child.children for child in node.children.values()):
            break
        node = node.children.get(tokens[position])
        if node is not None and node.latent is not None:
            fallback = vocabulary.base_size + node.latent
    if node is None or not node.children or _is_open(vocabulary, tokens, edges[:index], position):
        return None
    completed = {
        token: vocabulary.base_size + child.latent
        for token, child in node.children.items()
        if child.latent is not None
    }
    return Decision(position=position - 1, completed=completed, fallback=fallback)


def _is_open(
    vocabulary: LatentVocabulary, tokens: Sequence[int], starts: Sequence[int], end: int
) -> bool:
    """Tell whether some latent that begins at `starts` could go on at `end`."""
    for start in reversed(starts):
        if end - start >= vocabulary.longest:
            return False
        node: TrieNode | None = vocabulary.trie
        for token in tokens[start:end]:
            node = node.children.get(token)
            if node is None:
                break
        if node is not None and node.children:
            return True
    return False


def align(vocabulary: LatentVocabulary, trajectory: Trajectory) -> AlignedTrajectory:
    """Encode a trajectory span by span and pair its rows.

    An unfinished last action leaves the code of its tail undecided where a longer latent could
    still have been completed; those rows are left out of the loss.
    """
    teacher_ids = trajectory.token_ids.astype(np.int64)
    columns: dict[str, list[int]] = {name: [] for name in COLUMNS}
    student_ids: list[int] = []
    for span in trajectory.spans:
        tokens = teacher_ids[span.start : span.end].tolist()
        units = vocabulary.encode(tokens)
        if span.role == ACTION:
            is_open = not trajectory.is_finished and span.end == len(teacher_ids)
            _pair_span(vocabulary, columns, student_ids, tokens, units, span.start, is_open=is_open)
        student_ids += units
    arrays = {
        name: np.asarray(values, dtype=bool if name == "is_sampled" else np.int64)
        for name, values in columns.items()
    }
    return AlignedTrajectory(
        trajectory_id=trajectory.trajectory_id,
        teacher_ids=teacher_ids,
        student_ids=np.asarray(student_ids, dtype=np.int64),
        **arrays,
    )


def padded(aligned: AlignedTrajectory, vocabulary: LatentVocabulary) -> AlignedTrajectory:
    """Repeat each latent in what the student reads until it is as long as its segment (LAR-PT).

    A row predicts from the last copy; all else stays.
    """
    lengths = np.asarray(vocabulary.lengths(aligned.student_ids.tolist()))
    return replace(
        aligned,
        student_ids=np.repeat(aligned.student_ids, lengths),
        student_rows=np.cumsum(lengths)[aligned.student_rows] - 1,
    )


def _pair_span(
    vocabulary: LatentVocabulary,
    columns: dict[str, list[int]],
    read: Sequence[int],
    tokens: Sequence[int],
    units: Sequence[int],
    start: int,
    *,
    is_open: bool,
) -> None:
    """Append the rows that predict the units of one action to `columns`.

    Args:
        vocabulary: Whose code `units` is.
        columns: Of an `AlignedTrajectory`, by name.
        read: Units before the span.
        tokens: Base tokens of the span.
        units: Their code.
        start: Position of the span among the teacher's ids.
        is_open: The action is unfinished.
    """
    pendings, first_undecided = pending_at_edges(vocabulary, tokens, units)
    num_decided = first_undecided if is_open and first_undecided is not None else len(units)
    edges = np.cumsum([0, *vocabulary.lengths(units)]).tolist()
    latents = np.flatnonzero(np.asarray([*read, *units]) >= vocabulary.base_size)
    first = 0 if start else 1  # nothing predicts the very first token
    first_row = len(columns["target_units"]) - first
    for index in range(first, num_decided):
        row, pending = first_row + index, pendings[index]
        last_latent = int(np.searchsorted(latents, len(read) + index)) - 1
        since = len(read) + index - 1 - int(latents[last_latent]) if last_latent >= 0 else -1
        columns["teacher_rows"].append(start + edges[index] - 1)
        columns["student_rows"].append(len(read) + index - 1)
        columns["target_tokens"].append(tokens[edges[index]])
        columns["target_units"].append(units[index])
        columns["is_sampled"].append(bool(pending.deep))
        columns["num_since_latent"].append(since)
        columns["banned_tokens"] += sorted(pending.banned)
        columns["banned_rows"] += [row] * len(pending.banned)
        for begins, latent, token in pending.latents:
            if begins >= first:
                columns["pending_rows"].append(row)
                columns["pending_starts"].append(first_row + begins)
                columns["pending_units"].append(vocabulary.base_size + latent)
                columns["pending_tokens"].append(token)
        if (decision := decision_of(vocabulary, tokens, edges, index)) is not None:
            columns["completing_decisions"] += [len(columns["decision_rows"])] * len(
                decision.completed
            )
            columns["completing_tokens"] += decision.completed
            columns["completed_units"] += decision.completed.values()
            columns["decision_rows"].append(row)
            columns["decision_positions"].append(start + decision.position)
            columns["fallback_units"].append(decision.fallback)
