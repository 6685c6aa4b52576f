"""Entropies from one reading of the policy."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from lar_lightning.errors import SettingError
from lar_lightning.models import scoring
from lar_lightning.trajectories import ACTION, NO_ENTROPY, Span, Trajectory

if TYPE_CHECKING:
    from conftest import TrajectoryMaker

TEXTS = ("return result", "for i in range(len(numbers)):\n    result += i", "x", "def f(x): pass")


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def trajectories(make_trajectory: "TrajectoryMaker") -> list[Trajectory]:
    """Not scored, of different lengths; the last has two actions."""
    single = [make_trajectory(text, entropies=np.nan) for text in TEXTS]
    first, second = single[0], single[1]
    num = len(first.token_ids)
    shifted = [Span(role=s.role, start=s.start + num, end=s.end + num) for s in second.spans]
    double = replace(
        second,
        trajectory_id="double",
        token_ids=np.concatenate([first.token_ids, second.token_ids]),
        entropies=np.concatenate([first.entropies, second.entropies]),
        spans=(*first.spans, *shifted),
    )
    return [replace(t, entropy_kind=NO_ENTROPY) for t in (*single, double)]


@torch.no_grad()
def naive_entropies(model: Any, trajectory: Trajectory) -> np.ndarray:
    logits = model(input_ids=torch.as_tensor(trajectory.token_ids).long()[None]).logits[0]
    predicted = torch.distributions.Categorical(logits=logits.double()).entropy()
    entropies = np.full(len(trajectory.token_ids), np.nan)
    for span in trajectory.spans:
        if span.role == ACTION:
            entropies[span.start : span.end] = predicted[span.start - 1 : span.end - 1]
    return entropies


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 10_000])
@pytest.mark.parametrize("logits_per_chunk", [1, 1500, 1 << 24])
def test_entropies_are_those_of_reading_each_trajectory_alone(
    tokens_per_batch: int,
    logits_per_chunk: int,
    model: Any,
    trajectories: list[Trajectory],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", logits_per_chunk)
    found = list(scoring.scored(model, trajectories, tokens_per_batch=tokens_per_batch))
    lengths = [len(trajectory.token_ids) for trajectory in found]
    assert lengths == sorted(lengths, reverse=True)
    by_id = {trajectory.trajectory_id: trajectory for trajectory in found}
    assert len(by_id) == len(trajectories)
    for trajectory in trajectories:
        scored = by_id[trajectory.trajectory_id]
        assert scored.entropy_kind == "exact"
        np.testing.assert_allclose(scored.entropies, naive_entropies(model, trajectory), atol=1e-4)


def test_entropy_of_certain_and_of_even_rows() -> None:
    head = torch.nn.Linear(2, 4, bias=False)
    head.weight.data = torch.tensor([[50.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    entropies = scoring.row_entropies(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), head)
    torch.testing.assert_close(entropies, torch.tensor([0.0, np.log(4.0)]), check_dtype=False)


def test_tokens_outside_the_vocabulary_are_refused_before_reading(
    model: Any, trajectories: list[Trajectory]
) -> None:
    bad = replace(trajectories[0], token_ids=trajectories[0].token_ids + 400)
    with pytest.raises(SettingError, match=r"must be below 500, the rows of `base_model`, got \d"):
        next(scoring.scored(model, [*trajectories, bad], tokens_per_batch=100))
