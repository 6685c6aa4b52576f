from dataclasses import replace

import pytest
import torch
from toy_language import RandomStudent, RandomTeacher, ids, strings, trajectory_of, vocabulary_of

from lar_lightning.alignment import align
from lar_lightning.batches import RowTargets, collate
from lar_lightning.losses import Folding, Heads, RowTerms, distillation_loss, row_terms
from lar_lightning.segments import LatentVocabulary

LATENT_SETS = [
    ("ab",),
    ("ab", "abcb"),
    ("ab", "abcb", "ca", "bbc", "caab"),
    ("aa", "aaa", "ba"),
    ("abc", "bca", "cab", "ab"),
    ("abca", "bc"),
    ("abcab", "cab", "bb", "cc"),
]


def terms_of(
    text: str,
    vocabulary: LatentVocabulary,
    teacher: RandomTeacher,
    student: RandomStudent,
    *,
    is_naive: bool = False,
) -> RowTerms:
    aligned = align(vocabulary, trajectory_of(text))
    teacher_logits = torch.stack([teacher(text[:row]) for row in aligned.teacher_rows])
    units = aligned.student_ids[1:].tolist()
    student_logits = torch.stack([student(tuple(units[:row])) for row in aligned.student_rows])
    targets = collate([aligned]).targets
    if is_naive:  # the teacher's next-token distribution as it is, as if nothing were pending
        empty = torch.empty(0, dtype=torch.int64)
        nothing = torch.zeros_like(targets.is_sampled)
        targets = replace(targets, is_sampled=nothing, banned_rows=empty, banned_tokens=empty)
    size = vocabulary.base_size
    folding = Folding(vocabulary.segments, size)
    return row_terms(
        teacher_logits, student_logits[:, :size], student_logits[:, size:], targets, folding
    )


def excess(
    segments: tuple[str, ...], teacher_seed: int, student_seed: int, *, is_naive: bool = False
) -> float:
    """Expected sum of rows minus the cross-entropy of encoded trajectories, over all strings.

    Where the loss is exact this is the teacher's entropy at soft rows: a constant, whatever the
    student is.
    """
    vocabulary = vocabulary_of(*segments)
    teacher = RandomTeacher(teacher_seed)
    student = RandomStudent(student_seed, vocabulary.base_size + len(vocabulary))
    total = 0.0
    for text in strings():
        terms = terms_of(text, vocabulary, teacher, student, is_naive=is_naive)
        cross_entropy = -student.log_probability(vocabulary.encode(ids(text)))
        rows = (terms.folded + terms.split).sum()
        total += float(teacher.log_probability(text).exp() * (rows - cross_entropy))
    return total


@pytest.mark.parametrize("segments", LATENT_SETS, ids="-".join)
@pytest.mark.parametrize("teacher_seed", [0, 1])
def test_rows_sum_to_the_trajectory_divergence_of_every_student(
    segments: tuple[str, ...], teacher_seed: int
) -> None:
    values = [excess(segments, teacher_seed, student_seed) for student_seed in (10, 11, 12)]
    assert max(values) - min(values) < 1e-9


def test_the_naive_target_fails_the_enumeration() -> None:
    values = [
        excess(("ab", "abcb", "ca", "bbc", "caab"), 0, seed, is_naive=True) for seed in (10, 11, 12)
    ]
    assert max(values) - min(values) > 1e-3


def test_constant_of_the_enumeration_is_the_negative_entropy_of_soft_rows() -> None:
    """One latent of two tokens leaves every row soft: the excess is minus their entropy."""
    vocabulary = vocabulary_of("ab")
    teacher = RandomTeacher(3)
    entropy = 0.0
    for text in strings():
        aligned = align(vocabulary, trajectory_of(text))
        assert not aligned.is_sampled.any()
        for row, position in enumerate(aligned.teacher_rows):
            log_p = teacher(text[:position]).clone()
            log_p[aligned.banned_tokens[aligned.banned_rows == row]] = -1e4
            log_p = log_p.log_softmax(0)
            entropy -= float(teacher.log_probability(text).exp() * (log_p.exp() * log_p).sum())
    assert excess(("ab",), 3, 7) == pytest.approx(-entropy, abs=1e-9)


def soft_targets(tokens: torch.Tensor) -> RowTargets:
    empty = torch.empty(0, dtype=torch.int64)
    is_sampled = torch.zeros(len(tokens), dtype=torch.bool)
    return RowTargets(
        tokens=tokens, units=tokens, is_sampled=is_sampled, banned_rows=empty, banned_tokens=empty
    )


def test_identical_models_without_latents_give_zero() -> None:
    logits = torch.randn(5, 7)
    terms = row_terms(
        logits, logits, torch.empty(5, 0), soft_targets(torch.arange(5)), Folding((), 7)
    )
    torch.testing.assert_close(terms.folded, torch.zeros(5), atol=1e-6, rtol=0)
    assert (terms.split == 0).all()
    assert terms.agrees.all()


def test_folded_probabilities_sum_to_one() -> None:
    folding = Folding([(0, 1), (0, 2), (3, 1)], 5)
    base, latent = torch.randn(4, 5), torch.randn(4, 3) * 10
    folded = base.index_copy(1, folding.first_tokens, folding(base, latent))
    total = torch.cat([base, latent], 1).logsumexp(1)
    torch.testing.assert_close((folded - total[:, None]).exp().sum(1), torch.ones(4))


def test_folding_is_stable_where_logits_are_far_apart() -> None:
    folding = Folding([(0, 1), (0, 2)], 2)
    base, latent = torch.tensor([[-300.0, 500.0]]), torch.tensor([[-300.0, -301.0]])
    expected = torch.tensor([[-300.0, -300.0, -301.0]]).logsumexp(1)
    torch.testing.assert_close(folding(base, latent)[:, 0], expected)


def test_rows_equal_plain_divergence_where_latents_have_no_mass() -> None:
    teacher, base = torch.randn(6, 9), torch.randn(6, 9)
    latent = torch.full((6, 2), -1e4)
    folding = Folding([(1, 2), (4, 5)], 9)
    terms = row_terms(teacher, base, latent, soft_targets(torch.arange(6)), folding)
    p = teacher.softmax(1)
    expected = (p * (teacher.log_softmax(1) - base.log_softmax(1))).sum(1)
    torch.testing.assert_close(terms.folded, expected)
    torch.testing.assert_close(terms.split, torch.zeros(6))


def test_latent_whose_second_token_is_impossible_is_driven_to_zero() -> None:
    """The teacher always writes `a` and then never `b`.

    Latent `ab` must die although its first token is certain.
    """
    vocabulary = vocabulary_of("ab")
    aligned = align(vocabulary, trajectory_of("acd"))
    targets = collate([aligned]).targets
    folding = Folding(vocabulary.segments, 4)
    teacher = torch.full((3, 4), -20.0)
    teacher[torch.arange(3), torch.tensor([0, 2, 3])] = 0.0
    student = torch.zeros(3, 5, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        terms = row_terms(teacher, student[:, :4], student[:, 4:], targets, folding)
        (terms.folded + terms.split).sum().backward()
        optimizer.step()
    assert student.softmax(1)[0, 4] < 1e-3
    assert student.softmax(1)[0, 0] > 0.99


def random_problem(
    num_rows: int = 23,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, RowTargets]:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 11, (num_rows,), generator=random)
    tokens[::4] = 2
    units = torch.where(torch.arange(num_rows) % 8 == 0, 11, tokens)
    targets = RowTargets(
        tokens=tokens,
        units=units,
        is_sampled=torch.arange(num_rows) % 5 == 0,
        banned_rows=torch.tensor([1, 1, 6, 22]),
        banned_tokens=(tokens[torch.tensor([1, 1, 6, 22])] + torch.tensor([1, 2, 1, 3])) % 11,
    )
    draw = [
        torch.randn(shape, generator=random)
        for shape in ((num_rows, 6), (num_rows, 6), (11, 6), (2, 6))
    ]
    return draw[0], draw[1], draw[2], draw[3], targets


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 23, 64])
def test_chunked_loss_and_gradients_equal_the_plain_ones(rows_per_chunk: int) -> None:
    teacher_hidden, student_hidden, base, latent, targets = random_problem()
    folding = Folding([(2, 3), (2, 4)], 11)
    hidden, head = student_hidden.clone().requires_grad_(), latent.clone().requires_grad_()
    loss, terms = distillation_loss(
        teacher_hidden,
        hidden,
        Heads(base=base, latent=head),
        targets,
        folding,
        split_weight=0.7,
        rows_per_chunk=rows_per_chunk,
    )
    (3 * loss).backward()

    plain_hidden, plain_head = (
        student_hidden.clone().requires_grad_(),
        latent.clone().requires_grad_(),
    )
    plain = row_terms(
        teacher_hidden @ base.T,
        plain_hidden @ base.T,
        plain_hidden @ plain_head.T,
        targets,
        folding,
    )
    expected = (plain.folded + 0.7 * plain.split).mean()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms.folded, plain.folded.detach())
    torch.testing.assert_close(hidden.grad, plain_hidden.grad)
    torch.testing.assert_close(head.grad, plain_head.grad)
    assert terms.folded.requires_grad is False


def test_padding_of_a_batch_does_not_move_the_rows() -> None:
    vocabulary = vocabulary_of("ab", "abc")
    short, long = (align(vocabulary, trajectory_of(text)) for text in ("abd", "cabcabd"))
    alone, together = collate([short]), collate([short, long])
    count = len(alone.targets)
    assert (
        together.student_ids.flatten()[together.student_rows[:count] + 1].tolist()
        == alone.targets.units.tolist()
    )
    assert (
        together.teacher_ids.flatten()[together.teacher_rows + 1].tolist()
        == together.targets.tokens.tolist()
    )
