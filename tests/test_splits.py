import pytest
import torch
from torch import Tensor
from toy_language import RandomTeacher, strings, trajectory_of, vocabulary_of

from lar_lightning.alignment import align
from lar_lightning.batches import DistillationBatch, RowTargets, collate
from lar_lightning.losses.distillation import row_weights
from lar_lightning.losses.folding import Folding, row_terms
from lar_lightning.losses.splits import SplitTarget, expected_units, taken_units
from lar_lightning.settings import DistillationSettings

IDENTITY = torch.eye(4, dtype=torch.float64)


def batch_of(texts: list[str], *segments: str) -> tuple[DistillationBatch, Tensor, list[str]]:
    """A batch, the teacher's logits at its decisions, and the prefix of each decision."""
    teacher = RandomTeacher(0)
    aligned = [align(vocabulary_of(*segments), trajectory_of(text)) for text in texts]
    prefixes = [item.trajectory_id[:i] for item in aligned for i in item.decision_positions]
    logits = torch.stack([teacher(prefix) for prefix in prefixes])
    return collate(aligned), logits, prefixes


def test_expected_choice_is_the_teachers_whether_or_not_the_latent_was_taken() -> None:
    batch, logits, prefixes = batch_of(["abd", "acd"], "ab")
    assert prefixes == ["a", "a"]
    target = expected_units(logits, IDENTITY, batch.decisions, batch.targets)
    p = float(RandomTeacher(0)("a").exp()[1])
    rows = {
        row: {
            int(unit): float(weight)
            for unit, weight in zip(
                target.units[target.rows == row], target.weights[target.rows == row], strict=True
            )
        }
        for row in range(len(batch.targets))
    }
    assert rows[0] == pytest.approx({0: 1 - p, 4: p})  # `ab` taken, then d
    assert rows[2] == pytest.approx({0: 1 - p, 4: p})  # `a`, then c, d
    assert rows[1] == rows[4] == {3: 1.0}


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 1000])
def test_targets_sum_to_one_in_each_row_and_do_not_depend_on_chunks(rows_per_chunk: int) -> None:
    batch, logits, _ = batch_of(list(strings()), "ab", "abc", "aca", "cb")
    target = expected_units(
        logits, IDENTITY, batch.decisions, batch.targets, rows_per_chunk=rows_per_chunk
    )
    total = torch.zeros(len(batch.targets)).double().index_add(0, target.rows, target.weights)
    torch.testing.assert_close(total, torch.ones_like(total))
    whole = expected_units(logits, IDENTITY, batch.decisions, batch.targets)
    torch.testing.assert_close(target.weights, whole.weights)
    assert (target.rows.diff() >= 0).all()


def test_batch_without_decisions_keeps_the_units_taken() -> None:
    batch = collate([align(vocabulary_of("ab"), trajectory_of("ccd"))])
    target = expected_units(torch.empty(0, 4), IDENTITY, batch.decisions, batch.targets)
    assert target.units.tolist() == batch.targets.units.tolist()
    assert target.weights.tolist() == [1.0] * len(batch.targets)


def fitted(targets: RowTargets, target: SplitTarget, shares: Tensor) -> float:
    """Probability of latent `ab` given `a` in a student that minimizes the expected split term."""
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=200, tolerance_grad=1e-12)
    settings = DistillationSettings(split="soft")

    def loss() -> Tensor:
        optimizer.zero_grad()
        latent = bias.expand(len(targets), 1)
        base = torch.zeros(len(targets), 4, dtype=torch.float64)
        terms = row_terms(base, base, latent, targets, Folding([(0, 1)], 4), settings, target)
        nats = (shares * terms.split).sum()
        nats.backward()
        return nats

    optimizer.step(loss)  # type: ignore[arg-type]
    return float(bias.detach().sigmoid())


def test_only_the_stopped_expectation_leads_to_the_teachers_probability() -> None:
    """The trap: P(rest | first) where the latent was taken, one-hot where not: gives its square."""
    batch, logits, _ = batch_of(["abd", "acd"], "ab")
    p = float(RandomTeacher(0)("a").exp()[1])
    shares = torch.tensor([p, 0, 1 - p, 0, 0], dtype=torch.float64)
    soft = expected_units(logits, IDENTITY, batch.decisions, batch.targets)
    assert fitted(batch.targets, taken_units(batch.targets), shares) == pytest.approx(p, abs=1e-5)
    assert fitted(batch.targets, soft, shares) == pytest.approx(p, abs=1e-5)
    is_trapped = (soft.rows != 2) | (soft.units == 0)
    weights = torch.where(soft.rows == 2, 1.0, soft.weights)[is_trapped]
    trap = SplitTarget(rows=soft.rows[is_trapped], units=soft.units[is_trapped], weights=weights)
    assert fitted(batch.targets, trap, shares) == pytest.approx(p**2, abs=1e-5)


def test_bernoulli_at_temperature_one_is_the_soft_split_up_to_a_constant() -> None:
    """One latent: taken against not taken is all there is to choose."""
    batch, logits, _ = batch_of(["abd", "acd", "abcd"], "ab")
    target = expected_units(logits, IDENTITY, batch.decisions, batch.targets)
    gaps = []
    for seed in (0, 1):
        random = torch.Generator().manual_seed(seed)
        student = torch.randn(len(batch.targets), 5, dtype=torch.float64, generator=random)
        soft, bernoulli = (
            row_terms(
                student[:, :4],
                student[:, :4],
                student[:, 4:],
                batch.targets,
                Folding([(0, 1)], 4),
                DistillationSettings(split=split, split_temperature=1.0),
                target,
            ).split
            for split in ("soft", "bernoulli")
        )
        gaps.append(soft - bernoulli)
    torch.testing.assert_close(gaps[0], gaps[1], atol=1e-4, rtol=0)


def test_rows_behind_a_latent_count_as_often_as_they_are_told() -> None:
    batch = collate([align(vocabulary_of("ab"), trajectory_of("cabccabcd"))])
    assert batch.targets.num_since_latent.tolist() == [-1, -1, 0, 1, 2, 0, 1]
    settings = DistillationSettings(num_rows_after_latent=2, weight_after_latent=4.0)
    assert row_weights(batch.targets, settings).tolist() == [1, 1, 4, 4, 1, 4, 4]
