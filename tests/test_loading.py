from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from toy_language import trajectory_of, vocabulary_of
from typing_extensions import override

from lar_lightning.alignment import AlignedTrajectory, align
from lar_lightning.batches import DistillationBatch
from lar_lightning.loading import TrajectoryLoader

Batch = list[str]


def aligned(num_trajectories: int) -> list[AlignedTrajectory]:
    """Trajectories of many lengths that all differ."""
    random = np.random.default_rng(0)
    vocabulary = vocabulary_of("ab", "abc")
    texts = ["abc"[index % 3] * (index // 3 + 1) + "d" for index in range(num_trajectories)]
    return [
        align(vocabulary, trajectory_of(texts[index])) for index in random.permutation(len(texts))
    ]


def names(batch: DistillationBatch) -> Batch:
    """Name the trajectories of a batch by their text."""
    rows = zip(batch.teacher_ids, batch.teacher_mask, strict=True)
    return ["".join("abcd"[token] for token in ids[mask.bool()][1:]) for ids, mask in rows]


def epoch_of(loader: TrajectoryLoader) -> list[Batch]:
    return [names(batch) for batch in loader]


def flat(batches: Sequence[Batch]) -> list[str]:
    return [name for batch in batches for name in batch]


ITEMS = aligned(23)
ALL = sorted(item.trajectory_id for item in ITEMS)


@given(
    num=st.integers(1, 23),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 3),
    is_shuffled=st.booleans(),
)
def test_each_trajectory_comes_once_an_epoch(
    num: int, batch_size: int, seed: int, is_shuffled: bool
) -> None:
    loader = TrajectoryLoader(
        ITEMS[:num], batch_size=batch_size, seed=seed, is_shuffled=is_shuffled
    )
    for _ in range(3):
        batches = epoch_of(loader)
        assert sorted(flat(batches)) == sorted(item.trajectory_id for item in ITEMS[:num])
        assert len(batches) == len(loader)
        assert max(map(len, batches)) <= batch_size


def test_order_is_another_in_each_epoch_and_the_same_for_a_seed() -> None:
    loader, again = (TrajectoryLoader(ITEMS, batch_size=4, seed=7) for _ in range(2))
    epochs = [epoch_of(loader) for _ in range(3)]
    assert epochs == [epoch_of(again) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epoch_of(TrajectoryLoader(ITEMS, batch_size=4, seed=8)) != epochs[0]


def test_order_without_shuffling_stays() -> None:
    loader = TrajectoryLoader(ITEMS, batch_size=4, is_shuffled=False)
    assert epoch_of(loader) == epoch_of(loader)


def test_batches_hold_trajectories_of_like_length() -> None:
    batches = epoch_of(TrajectoryLoader(ITEMS, batch_size=4))
    assert max(max(map(len, batch)) - min(map(len, batch)) for batch in batches) <= 2


def test_grouped_samples_of_a_prompt_come_together() -> None:
    vocabulary = vocabulary_of("ab", "abc")
    texts = [letter * length + "d" for letter in "abc" for length in (1, 2, 3, 4)]
    order = np.random.default_rng(0).permutation(len(texts))
    items = [align(vocabulary, trajectory_of(texts[index])) for index in order]
    for item in items:  # a prompt of one token, made to differ by task
        task = int(item.teacher_ids[1])
        item.teacher_ids[0] = item.student_ids[0] = task
    loader = TrajectoryLoader(items, batch_size=4, is_grouped=True)
    epochs = [epoch_of(loader) for _ in range(4)]
    for batches in epochs:
        assert sorted(flat(batches)) == sorted(texts)
        assert all(len({text[0] for text in batch}) == 1 for batch in batches)
    assert len({str(batches) for batches in epochs}) > 1


def test_trajectories_without_a_row_are_left_out() -> None:
    undecided = align(vocabulary_of("ab"), trajectory_of("a", is_finished=False))
    assert len(undecided.target_units) == 0
    loader = TrajectoryLoader([undecided, *ITEMS], batch_size=4)
    assert sorted(flat(epoch_of(loader))) == ALL


@pytest.mark.parametrize("num_seen", [0, 1, 3, 5, 6, 7, 13])
def test_restored_state_goes_on_where_it_was_taken(num_seen: int) -> None:
    """Six batches an epoch; 6 is a state taken after the last, before anyone asked for more."""

    def stream(loader: TrajectoryLoader) -> Iterator[Batch]:
        while True:
            yield from map(names, loader)

    loader = TrajectoryLoader(ITEMS, batch_size=4, seed=1)
    assert len(loader) == 6
    batches = stream(loader)
    for _ in range(num_seen):
        next(batches)
    state = loader.state_dict()
    expected = [next(batches) for _ in range(15)]
    restored = TrajectoryLoader(ITEMS, batch_size=4, seed=1)
    restored.load_state_dict(state)
    found = stream(restored)
    assert [next(found) for _ in range(15)] == expected


def test_epoch_that_was_left_early_does_not_shift_the_next() -> None:
    loader = TrajectoryLoader(ITEMS, batch_size=4, is_shuffled=False)
    whole = epoch_of(TrajectoryLoader(ITEMS, batch_size=4, is_shuffled=False))
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    assert epoch_of(loader) == whole


def test_epoch_that_nobody_exhausts_is_followed_by_a_whole_one() -> None:
    """A caller that knows the length never asks for the batch after the last."""
    loader = TrajectoryLoader(ITEMS, batch_size=4)
    for _ in range(3):
        batches = iter(loader)
        assert sorted(flat([names(next(batches)) for _ in range(len(loader))])) == ALL


@given(num=st.integers(1, 23), batch_size=st.integers(1, 9), num_ranks=st.integers(1, 6))
def test_ranks_share_all_batches_and_get_equally_many(
    num: int, batch_size: int, num_ranks: int
) -> None:
    loaders = [
        TrajectoryLoader(ITEMS[:num], batch_size=batch_size, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    for _ in range(2):
        shares = [epoch_of(loader) for loader in loaders]
        assert {len(share) for share in shares} == {len(loaders[0])}
        together = flat([batch for share in shares for batch in share])
        assert set(together) == {item.trajectory_id for item in ITEMS[:num]}
        # Only what fills up the last round comes twice.
        num_batches = -(-num // batch_size)
        num_filling = -num_batches % num_ranks
        assert sum(len(share) for share in shares) == num_batches + num_filling
        assert len(together) - num <= num_filling * batch_size


class Witness(L.LightningModule):
    """Writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.training_batches: list[tuple[int, Batch]] = []
        self.validation_batches: list[Batch] = []

    @override
    def training_step(self, batch: DistillationBatch, batch_idx: int) -> torch.Tensor:
        self.training_batches.append((self.current_epoch, names(batch)))
        return self.weight.sum()

    @override
    def validation_step(self, batch: DistillationBatch, batch_idx: int) -> None:
        self.validation_batches.append(names(batch))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, *, max_steps: int, resume: bool = False, every: int | None = 1) -> Witness:
    """Train on CPU over a loader of six batches and keep the last checkpoint in `folder`."""
    witness = Witness()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=2,
        callbacks=[
            ModelCheckpoint(folder, filename="c", save_last=True, every_n_train_steps=every)
        ],
    )
    trainer.fit(
        witness,
        TrajectoryLoader(ITEMS, batch_size=4, seed=1),
        TrajectoryLoader(ITEMS, batch_size=8, is_shuffled=False),
        ckpt_path=str(folder / "last.ckpt") if resume else None,
        weights_only=False,
    )
    return witness


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("num_steps", "every"), [(2, 1), (6, 1), (6, None), (9, 1), (12, None)])
def test_lightning_trains_every_epoch_and_resumes_exactly(
    tmp_path: Path, num_steps: int, every: int | None
) -> None:
    whole = fit(tmp_path / "whole", max_steps=18).training_batches
    assert [epoch for epoch, _ in whole] == [0] * 6 + [1] * 6 + [2] * 6
    for epoch in range(3):
        assert sorted(flat([batch for at, batch in whole if at == epoch])) == ALL
    first = fit(tmp_path, max_steps=num_steps, every=every).training_batches
    second = fit(tmp_path, max_steps=18, resume=True).training_batches
    assert first + second == whole


@pytest.mark.filterwarnings("ignore")
def test_lightning_validates_on_all_trajectories_after_a_partial_check(tmp_path: Path) -> None:
    batches = fit(tmp_path, max_steps=12).validation_batches
    assert len(batches) == 2 + 3 + 3
    assert sorted(flat(batches[2:5])) == ALL
    assert batches[2:5] == batches[5:8]
