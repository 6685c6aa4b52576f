import weakref
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_language import RandomStudent, RandomTeacher, ids, strings, trajectory_of, vocabulary_of

from lar_lightning.alignment import AlignedTrajectory, align
from lar_lightning.batches import DistillationBatch, RowTargets, collate
from lar_lightning.losses.distillation import Heads, distillation_loss, row_weights
from lar_lightning.losses.folding import Folding, row_terms
from lar_lightning.losses.splits import SplitTarget, expected_units, taken_units
from lar_lightning.settings import DistillationSettings

LATENT_SETS = [
    ("ab",),
    ("ab", "abcb"),
    ("ab", "abcb", "ca", "bbc", "caab"),
    ("aa", "aaa", "ba"),
    ("abc", "bca", "cab", "ab"),
    ("abca", "bc"),
    ("abcab", "cab", "bb", "cc"),
    ("ab", "ac", "abc", "acb"),  # a common first token, some prefixes of others
    ("aab", "aac", "ba", "cc"),  # chains in which each can follow each
    ("bc", "bca", "bcab", "ab"),
]
EXACT = DistillationSettings()
SOFT = DistillationSettings(split="soft")


@cache
def enumeration(segments: tuple[str, ...]) -> tuple[list[AlignedTrajectory], DistillationBatch]:
    """All strings of the language, aligned, and as one batch."""
    vocabulary = vocabulary_of(*segments)
    aligned = [align(vocabulary, trajectory_of(text)) for text in strings()]
    return aligned, collate(aligned)


@cache
def teacher_of(seed: int) -> RandomTeacher:
    return RandomTeacher(seed)


def excess(
    segments: tuple[str, ...],
    teacher_seed: int,
    student_seed: int,
    *,
    is_naive: bool = False,
    settings: DistillationSettings = EXACT,
) -> float:
    """Expected sum of rows minus the cross-entropy of encoded trajectories, over all strings.

    Where the loss is exact this is the teacher's entropy at soft rows: a constant, whatever the
    student is.
    """
    vocabulary = vocabulary_of(*segments)
    size = vocabulary.base_size
    teacher = teacher_of(teacher_seed)
    student = RandomStudent(student_seed, size + len(vocabulary))
    aligned, batch = enumeration(segments)
    named = [(item, item.trajectory_id) for item in aligned]
    teacher_logits = torch.stack([teacher(t[:i]) for item, t in named for i in item.teacher_rows])
    prefixes = [tuple(item.student_ids[1 : i + 1]) for item, _ in named for i in item.student_rows]
    student_logits = torch.stack([student(prefix) for prefix in prefixes])
    targets, split_target = batch.targets, None
    if settings.split != "nll":  # the toy teacher's hidden states are its logits
        deciding = [teacher(t[:i]) for item, t in named for i in item.decision_positions]
        identity = torch.eye(size, dtype=torch.float64)
        split_target = expected_units(torch.stack(deciding), identity, batch.decisions, targets)
    if is_naive:  # the teacher's next-token distribution as it is, as if nothing were pending
        empty = torch.empty(0, dtype=torch.int64)
        nothing = torch.zeros_like(targets.is_sampled)
        targets = replace(targets, is_sampled=nothing, banned_rows=empty, banned_tokens=empty)
    terms = row_terms(
        teacher_logits,
        student_logits[:, :size],
        student_logits[:, size:],
        targets,
        Folding(vocabulary.segments, size),
        settings,
        split_target,
    )
    probability = torch.stack([teacher.log_probability(text) for _, text in named]).exp()
    per_string = torch.tensor([len(item.target_units) for item in aligned])
    total = ((terms.folded + terms.split) * probability.repeat_interleave(per_string)).sum()
    cross_entropy = -torch.stack(
        [student.log_probability(vocabulary.encode(ids(text))) for _, text in named]
    )
    return float(total - (probability * cross_entropy).sum())


@pytest.mark.parametrize("settings", [EXACT, SOFT], ids=["nll", "soft"])
@pytest.mark.parametrize("segments", LATENT_SETS, ids="-".join)
@pytest.mark.parametrize("teacher_seed", [0, 1])
def test_rows_sum_to_the_trajectory_divergence_of_every_student(
    segments: tuple[str, ...], teacher_seed: int, settings: DistillationSettings
) -> None:
    values = [
        excess(segments, teacher_seed, student_seed, settings=settings)
        for student_seed in (10, 11, 12)
    ]
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
        tokens=tokens,
        units=tokens,
        is_sampled=is_sampled,
        banned_rows=empty,
        banned_tokens=empty,
        num_since_latent=torch.full_like(tokens, -1),
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
        num_since_latent=torch.arange(num_rows) % 5 - 1,
    )
    draw = [
        torch.randn(shape, generator=random)
        for shape in ((num_rows, 6), (num_rows, 6), (11, 6), (2, 6))
    ]
    return draw[0], draw[1], draw[2], draw[3], targets


FORMS = {
    "default": DistillationSettings(),
    "split_weight": DistillationSettings(split_weight=0.7),
    "temperature": DistillationSettings(temperature=2.5),
    "reverse_kl": DistillationSettings(divergence="reverse_kl"),
    "jsd": DistillationSettings(divergence="jsd", beta=0.3, temperature=0.5),
    "soft": DistillationSettings(split="soft"),
    "bernoulli": DistillationSettings(split="bernoulli", split_temperature=5.0),
    "after_latent": DistillationSettings(num_rows_after_latent=2, weight_after_latent=3.0),
    "truncated_kl": DistillationSettings(objective="truncated_kl", split_weight=0.5),
    "cross_entropy": DistillationSettings(objective="cross_entropy"),
}


def split_target_of(targets: RowTargets) -> SplitTarget:
    """Rows 0, 8 and 16 took latent 11, which begins with token 2: soften two of them."""
    target = taken_units(targets)
    rows = torch.cat([target.rows, torch.tensor([0, 8])])
    order = rows.argsort(stable=True)
    weights = target.weights.double()
    weights[[0, 8]] = torch.tensor([0.9, 0.4], dtype=torch.float64)
    return SplitTarget(
        rows=rows[order],
        units=torch.cat([target.units, torch.tensor([2, 12])])[order],
        weights=torch.cat([weights, torch.tensor([0.1, 0.6]).double()])[order],
    )


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 64])
@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
def test_chunked_loss_and_gradients_equal_the_plain_ones(
    settings: DistillationSettings, rows_per_chunk: int
) -> None:
    *tensors, targets = random_problem()
    teacher_hidden, *start = [tensor.double() for tensor in tensors]
    folding = Folding([(2, 3), (2, 4)], 11)
    split_target = split_target_of(targets)
    teacher_head = start[1] + 0.1

    hidden, base, latent = (tensor.clone().requires_grad_() for tensor in start)
    heads = Heads(teacher=teacher_head, base=base, latent=latent)
    loss, terms = distillation_loss(
        teacher_hidden,
        hidden,
        heads,
        targets,
        folding,
        settings=settings,
        split_target=split_target,
        rows_per_chunk=rows_per_chunk,
    )
    (3 * loss).backward()

    plain = [tensor.clone().requires_grad_() for tensor in start]
    expected = row_terms(
        teacher_hidden @ teacher_head.T,
        plain[0] @ plain[1].T,
        plain[0] @ plain[2].T,
        targets,
        folding,
        settings,
        split_target,
    )
    weights = row_weights(targets, settings).double()
    nats = expected.folded + settings.split_weight * expected.split
    total = (weights * nats).sum() / weights.sum()
    (3 * total).backward()
    exactly = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)
    exactly(loss, total)
    exactly(terms.folded, expected.folded.detach())
    for found, tensor in zip((hidden, base, latent), plain, strict=True):
        exactly(found.grad, tensor.grad)
    assert terms.folded.requires_grad is False


@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
def test_gradients_are_those_of_the_definition(settings: DistillationSettings) -> None:
    *tensors, targets = random_problem()
    teacher_hidden, *start = [tensor.double() for tensor in tensors]
    folding, split_target = Folding([(2, 3), (2, 4)], 11), split_target_of(targets)

    def loss(hidden: Tensor, base: Tensor, latent: Tensor) -> Tensor:
        heads = Heads(teacher=start[1] + 0.1, base=base, latent=latent)
        return distillation_loss(
            teacher_hidden,
            hidden,
            heads,
            targets,
            folding,
            settings=settings,
            split_target=split_target,
            rows_per_chunk=9,
        )[0]

    inputs = tuple(tensor.clone().requires_grad_() for tensor in start)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_frozen_base_head_gets_no_gradient_and_costs_none() -> None:
    teacher_hidden, hidden, base, latent, targets = random_problem()
    heads = Heads(teacher=base, base=base, latent=latent.requires_grad_())
    folding = Folding([(2, 3), (2, 4)], 11)
    loss, _ = distillation_loss(teacher_hidden, hidden.requires_grad_(), heads, targets, folding)
    loss.backward()
    assert base.grad is None
    assert latent.grad is not None


def latent_gradient(settings: DistillationSettings) -> float:
    teacher_hidden, hidden, base, latent, targets = random_problem()
    heads = Heads(teacher=base, base=base, latent=latent.requires_grad_())
    folding = Folding([(2, 3), (2, 4)], 11)
    loss, _ = distillation_loss(teacher_hidden, hidden, heads, targets, folding, settings=settings)
    (gradient,) = torch.autograd.grad(loss, latent)
    return float(gradient.abs().max())


def test_latents_get_a_signal_from_the_folded_term_alone() -> None:
    """The trap: a divergence of base vocabularies with weight 1 says nothing to latents."""
    assert latent_gradient(DistillationSettings(split_weight=0.0)) > 1e-3
    trap = DistillationSettings(objective="truncated_kl", split_weight=0.0)
    assert latent_gradient(trap) == 0


class LiveLogits(TorchDispatchMode):
    """Counts the largest tensor made, and the logits of chunks that are alive at the same time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.largest, self.most = size, 0, 0
        self.alive: set[weakref.ref[torch.UntypedStorage]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.numel() >= self.size:
                    self.alive.add(weakref.ref(tensor.untyped_storage(), self.alive.discard))
        self.most = max(self.most, len(self.alive))
        return result


@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
def test_memory_does_not_grow_with_the_rows(settings: DistillationSettings) -> None:
    """The trap: logits of all rows at once, or those of every chunk kept until the end."""
    most = []
    for num_rows in (256, 1024):
        size = 997
        hidden = torch.randn(num_rows, 8, requires_grad=True)
        base, latent = torch.randn(size, 8), torch.randn(2, 8, requires_grad=True)
        heads = Heads(teacher=base, base=base, latent=latent)
        targets = soft_targets(torch.randint(0, size, (num_rows,)))
        folding = Folding([(2, 3), (2, 4)], size)
        with LiveLogits(64 * size) as live:
            loss, _ = distillation_loss(
                hidden.detach(), hidden, heads, targets, folding, settings=settings
            )
            loss.backward()
        assert live.largest <= 64 * (size + 2)
        most.append(live.most)
    assert most[0] == most[1]


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
