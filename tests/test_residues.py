from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_language import ALPHABET, RandomStudent, RandomTeacher, ids, strings, trajectory_of
from toy_language import vocabulary_of as vocabulary

from lar_lightning.alignment import align, pending_at_edges
from lar_lightning.batches import DistillationBatch, collate
from lar_lightning.losses.distillation import Heads
from lar_lightning.losses.folding import Folding, row_terms
from lar_lightning.losses.residues import Residues, residues
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import DistillationSettings

SIZE = len(ALPHABET)
SETS = [("ab",), ("abc",), ("ab", "bc"), ("ab", "ac"), ("ab", "ca"), ("abc", "ca")]
"""Texts before a pending latent can be written in one way."""
OTHERS = [
    ("abca", "bc"),
    ("aab", "ba", "cc"),
    ("ab", "abcb", "ca", "bbc", "caab"),
    ("aa", "aaa", "ba"),
    ("bc", "bca", "bcab", "ab"),
]
ALL = pytest.mark.parametrize("segments", SETS + OTHERS, ids="-".join)


class TextualStudent:
    """Writes the teacher's texts, and takes each latent `adoption` as often as encoding would."""

    def __init__(self, vocabulary: LatentVocabulary, teacher: RandomTeacher, adoption: float):
        self.vocabulary, self.teacher, self.adoption = vocabulary, teacher, adoption
        self.tables: dict[tuple[int, ...], np.ndarray] = {}

    def __call__(self, units: tuple[int, ...]) -> np.ndarray:
        """Return the probability of each unit after some units."""
        if units not in self.tables:
            self.tables[units] = self._probabilities(units)
        return self.tables[units]

    def _probabilities(self, units: tuple[int, ...]) -> np.ndarray:
        text = "".join(ALPHABET[token] for token in self.vocabulary.expand(list(units)))
        p = self.teacher(text).exp().numpy()
        end = SIZE - 1
        tokens = [*ids(text), end]
        pending = pending_at_edges(self.vocabulary, tokens, [*units, end])[0][-1]
        ratios = []
        for start, latent, token in pending.latents:
            written = np.prod([self(units[:i])[units[i]] for i in range(start, len(units))])
            ratios.append((token, self(units[:start])[SIZE + latent] / written))
        total = 1 + sum(ratio for _, ratio in ratios)
        left = p.copy()
        for token, ratio in ratios:
            left[token] -= ratio / total
        left = left.clip(0)
        left /= left.sum()
        units_of = np.concatenate([left, np.zeros(len(self.vocabulary))])
        for latent, segment in enumerate(self.vocabulary.segments):
            rest = "".join(ALPHABET[token] for token in segment)
            given_first = np.prod(
                [
                    float(self.teacher(text + rest[:i]).exp()[ALPHABET.index(rest[i])])
                    for i in range(1, len(rest))
                ]
            )
            share = self.adoption * given_first / len(self.vocabulary)
            units_of[SIZE + latent] = left[segment[0]] * share
            units_of[segment[0]] -= left[segment[0]] * share
        return units_of

    def texts(self) -> dict[str, float]:
        """Return the probability of each text, summed over the ways to write it."""
        found: dict[str, float] = {}

        def write(units: tuple[int, ...], text: str, mass: float) -> None:
            if text.endswith("d"):
                found[text] = found.get(text, 0.0) + mass
                return
            if mass < 1e-15 or len(text) > 12:
                return
            for unit, probability in enumerate(self(units)):
                more = "".join(ALPHABET[token] for token in self.vocabulary.expand([unit]))
                write((*units, unit), text + more, mass * probability)

        write((), "", 1.0)
        return found


@pytest.mark.parametrize("segments", SETS, ids="-".join)
@pytest.mark.parametrize("adoption", [0.0, 0.4, 1.0])
def test_what_is_left_makes_texts_the_teachers_whatever_is_abbreviated(
    segments: tuple[str, ...], adoption: float
) -> None:
    teacher = RandomTeacher(0)
    texts = TextualStudent(vocabulary(*segments), teacher, adoption).texts()
    for text in strings():
        expected = float(teacher.log_probability(text).exp())
        assert texts.get(text, 0.0) == pytest.approx(expected, abs=1e-9), text


@cache
def enumeration(segments: tuple[str, ...]) -> tuple[DistillationBatch, list[str], list[tuple]]:
    """All strings as one batch, and before each row the text and the units."""
    aligned = [align(vocabulary(*segments), trajectory_of(text)) for text in strings()]
    texts = [item.trajectory_id[:i] for item in aligned for i in item.teacher_rows]
    units = [
        tuple(item.student_ids[1 : i + 1].tolist()) for item in aligned for i in item.student_rows
    ]
    return collate(aligned), texts, units


def terms_of(segments: tuple[str, ...], teacher: RandomTeacher, logits: Tensor):
    """Return the terms of a student with these logits, whose hidden states they are."""
    batch, texts, _ = enumeration(segments)
    taken = taken_by(segments, logits)
    return row_terms(
        torch.stack([teacher(text) for text in texts]),
        logits[:, :SIZE],
        logits[:, SIZE:],
        batch.targets,
        Folding(vocabulary(*segments).segments, SIZE),
        DistillationSettings(pending="residual"),
        residues=taken,
    )


def taken_by(segments: tuple[str, ...], logits: Tensor, rows_per_chunk: int = 7) -> Residues:
    batch, _, _ = enumeration(segments)
    identity = torch.eye(logits.shape[1], dtype=torch.float64)
    heads = Heads(teacher=identity[:SIZE], base=identity[:SIZE], latent=identity[SIZE:])
    return residues(logits, heads, batch.targets, batch.pendings, rows_per_chunk=rows_per_chunk)


@pytest.mark.parametrize("segments", SETS, ids="-".join)
@pytest.mark.parametrize("adoption", [0.0, 0.4])
def test_student_that_writes_the_teachers_texts_is_at_zero_whatever_it_abbreviates(
    segments: tuple[str, ...], adoption: float
) -> None:
    teacher = RandomTeacher(0)
    student = TextualStudent(vocabulary(*segments), teacher, adoption)
    _, _, prefixes = enumeration(segments)
    logits = torch.tensor(np.stack([student(units) for units in prefixes])).clamp_min(1e-300).log()
    assert terms_of(segments, teacher, logits).folded.abs().max() < 1e-5


@ALL
@pytest.mark.parametrize("teacher_seed", [0, 1])
def test_student_that_is_the_encoded_teacher_is_at_zero(
    segments: tuple[str, ...], teacher_seed: int
) -> None:
    teacher, known = RandomTeacher(teacher_seed), vocabulary(*segments)
    masses: dict[tuple, np.ndarray] = {}
    for text in strings():
        units = known.encode(ids(text))
        for row, unit in enumerate(units):
            mass = masses.setdefault(tuple(units[:row]), np.zeros(SIZE + len(known)))
            mass[unit] += float(teacher.log_probability(text).exp())
    _, _, prefixes = enumeration(segments)
    shares = np.stack([masses[units] / masses[units].sum() for units in prefixes])
    folded = terms_of(segments, teacher, torch.tensor(shares).clamp_min(1e-300).log()).folded
    is_possible = torch.tensor([masses[units].sum() > 1e-9 for units in prefixes])
    assert folded[is_possible].abs().max() < 1e-4
    assert is_possible.sum() > 20


@ALL
def test_nothing_is_left_out_for_a_latent_that_is_never_taken(segments: tuple[str, ...]) -> None:
    teacher = RandomTeacher(0)
    _, texts, prefixes = enumeration(segments)
    plain = torch.stack([teacher(text) for text in texts])
    never = torch.full((len(texts), len(segments)), -1e4, dtype=torch.float64)
    folded = terms_of(segments, teacher, torch.cat([plain, never], 1)).folded
    is_explicit = torch.tensor([max(units, default=0) < SIZE for units in prefixes])
    folded = folded[is_explicit]  # behind a latent it has been taken
    torch.testing.assert_close(folded, torch.zeros_like(folded), atol=1e-9, rtol=0)


@ALL
def test_shares_are_those_of_the_students_own_ways_to_write_the_text(
    segments: tuple[str, ...],
) -> None:
    batch, _, prefixes = enumeration(segments)
    student = RandomStudent(5, SIZE + len(segments))
    logits = torch.stack([student(units) for units in prefixes])
    found = taken_by(segments, logits)
    by_row: dict[int, list[tuple[float, float]]] = {}
    for row, start, unit, share in zip(
        *(getattr(batch.pendings, name).tolist() for name in ("rows", "starts", "units")),
        found.shares.tolist(),
        strict=True,
    ):
        written = sum(
            float(logits[i].log_softmax(0)[batch.targets.units[i]]) for i in range(start, row)
        )
        could = float(logits[start].log_softmax(0)[unit])
        by_row.setdefault(row, []).append((float(np.exp(could - written)), share))
    assert by_row
    for ratios in by_row.values():
        total = 1 + sum(ratio for ratio, _ in ratios)
        for ratio, share in ratios:
            assert share == pytest.approx(ratio / total, rel=1e-9)
    torch.testing.assert_close(found.shares, taken_by(segments, logits, 1000).shares)


def test_a_token_without_probability_stays_finite() -> None:
    taken = Residues(
        rows=torch.tensor([0, 0, 1]), tokens=torch.tensor([2, 2, 0]), shares=torch.ones(3) * 0.9
    )
    logits = torch.tensor([[0.0, 1.0, -500.0, 2.0], [2.0, 0.0, 0.0, 0.0]])
    left = taken.left_of(logits)
    assert left.isfinite().all()
    assert left[0].softmax(0)[2] < 1e-30
    assert left[1].softmax(0)[0] < 1e-6
