"""A loader of aligned trajectories that can be resumed in the middle of an epoch."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lar_lightning.alignment import AlignedTrajectory
from lar_lightning.artefacts import differences
from lar_lightning.batches import DistillationBatch, collate
from lar_lightning.errors import SettingError

BATCHES_PER_BUCKET = 8
"""Trajectories are sorted by length within this many batches: little padding, still near random
order."""


class TrajectoryLoader:
    """Yields collated batches; its state is the epoch and the number of batches already given.

    Lightning saves and restores the state with a checkpoint. Order depends on seed and epoch
    alone. Iterating again begins the next epoch, also where the last one was left early; after a
    restored state it goes on from there.
    """

    def __init__(
        self,
        trajectories: Sequence[AlignedTrajectory],
        *,
        batch_size: int,
        seed: int = 0,
        is_shuffled: bool = True,
        is_grouped: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """Set up the loader.

        Args:
            trajectories: Of which those without a row in the loss are left out.
            batch_size: Trajectories a batch.
            seed: Of the order.
            is_shuffled: False keeps the order, bucketed by length.
            is_grouped: Samples of one prompt come together: it is read once for them.
            rank: Which share of the batches is this process's.
            num_ranks: Number of processes; all get equally many batches.
        """
        self.trajectories = [item for item in trajectories if len(item.target_units)]
        self.batch_size = batch_size
        self.seed = seed
        self.is_shuffled = is_shuffled
        self.is_grouped = is_grouped
        self.rank = rank
        self.num_ranks = num_ranks
        self.epoch = 0
        self.num_yielded = 0
        self.seconds_loading = 0.0
        """Spent on making batches, while training waited."""
        self._is_restored = False
        self._num_units = sum(len(item.student_ids) for item in self.trajectories)

    def realign(self, trajectories: Sequence[AlignedTrajectory]) -> None:
        """Take the same trajectories in another latent form, from the next batch on.

        An epoch that has begun keeps its order, so do this between epochs.
        """
        realigned = [item for item in trajectories if len(item.target_units)]
        assert [item.trajectory_id for item in realigned] == [
            item.trajectory_id for item in self.trajectories
        ], "the trajectories are the same"
        self.trajectories = realigned

    def __len__(self) -> int:
        num_batches = -(-len(self.trajectories) // self.batch_size)
        return -(-num_batches // self.num_ranks)

    def __iter__(self) -> Iterator[DistillationBatch]:
        # Lightning knows the length and never asks for the batch after the last, so nothing can be
        # left for then.
        if self.num_yielded >= (len(self) if self._is_restored else 1):
            self.epoch, self.num_yielded = self.epoch + 1, 0
        self._is_restored = False
        batches = self.batches_of_epoch()
        while self.num_yielded < len(batches):
            self.num_yielded += 1
            start = time.perf_counter()
            batch = collate([self.trajectories[index] for index in batches[self.num_yielded - 1]])
            self.seconds_loading += time.perf_counter() - start
            yield batch

    def batches_of_epoch(self) -> list[list[int]]:
        """Return the trajectories of each of this process's batches, by index."""
        random = np.random.default_rng([self.seed, self.epoch])
        groups = self._groups()
        places = np.arange(len(groups))
        if self.is_shuffled:
            random.shuffle(places)
        order = np.asarray([index for place in places for index in groups[place]], dtype=np.int64)
        lengths = np.zeros(len(order), dtype=np.int64)
        for group in groups:  # sorted by the longest, a group stays together
            lengths[group] = max(len(self.trajectories[index].student_ids) for index in group)
        bucket = self.batch_size * BATCHES_PER_BUCKET
        batches: list[list[int]] = []
        for start in range(0, len(order), bucket):
            members = order[start : start + bucket]
            members = members[np.argsort(lengths[members], kind="stable")]
            batches += [
                members[i : i + self.batch_size].tolist()
                for i in range(0, len(members), self.batch_size)
            ]
        if self.is_shuffled:
            random.shuffle(batches)
        batches += [batches[i % len(batches)] for i in range(-len(batches) % self.num_ranks)]
        return batches[self.rank :: self.num_ranks]

    def _groups(self) -> list[list[int]]:
        groups: dict[int | bytes, list[int]] = {}
        for index, item in enumerate(self.trajectories):
            prompt = item.teacher_ids[: item.teacher_rows[0] + 1].tobytes()
            groups.setdefault(prompt if self.is_grouped else index, []).append(index)
        return list(groups.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what the order that it is a position in depends on."""
        return {
            "epoch": self.epoch,
            "num_yielded": self.num_yielded,
            "num_ranks": self.num_ranks,
            "order": self._order(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; also to one under another number of processes.

        Raises:
            SettingError: if it is one in another order of batches.
        """
        changed = differences(state["order"], self._order())
        if changed:
            raise SettingError(
                f"a run must go on with the batches that it began with, got others ({changed}). "
                "Restore `data` as it was, or choose another `run_dir`."
            )
        num_of_all = state["num_yielded"] * state.get("num_ranks", self.num_ranks)
        self.epoch = state["epoch"]
        self.num_yielded = min(-(-num_of_all // self.num_ranks), len(self))
        self._is_restored = True

    def _order(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "is_grouped": self.is_grouped,
            "num_trajectories": len(self.trajectories),
            "num_units": self._num_units,
        }
