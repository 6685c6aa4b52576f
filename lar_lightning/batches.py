"""Batches of aligned trajectories: padded ids for the two models, flat rows for the loss.

Dimensions: B trajectories, T teacher positions, S student positions, R rows in the loss, P banned
tokens, N pending latents, Q decisions, L tokens that would complete a latent there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lar_lightning.alignment import AlignedTrajectory


class Movable:
    """A record of tensors that moves to a device as one, as Lightning asks of a batch."""

    def to(self, device: torch.device) -> Self:
        """Move all tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        moved = {name: v.to(device) if hasattr(v, "to") else v for name, v in values.items()}
        return type(self)(**moved)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowTargets(Movable):
    """What the rows of a batch are held against; see `alignment` for the terms."""

    tokens: Int[Tensor, " R"]
    units: Int[Tensor, " R"]
    is_sampled: Bool[Tensor, " R"]
    banned_rows: Int[Tensor, " P"]
    banned_tokens: Int[Tensor, " P"]
    num_since_latent: Int[Tensor, " R"]

    def __len__(self) -> int:
        return len(self.tokens)

    def chunk(self, start: int, end: int) -> "RowTargets":
        """Return rows start..end with their banned tokens."""
        low, high = torch.searchsorted(
            self.banned_rows, torch.tensor([start, end], device=self.tokens.device)
        ).tolist()
        return RowTargets(
            tokens=self.tokens[start:end],
            units=self.units[start:end],
            is_sampled=self.is_sampled[start:end],
            banned_rows=self.banned_rows[low:high] - start,
            banned_tokens=self.banned_tokens[low:high],
            num_since_latent=self.num_since_latent[start:end],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pendings(Movable):
    """Latents that could have been taken at an earlier row and still agree; see `alignment`."""

    rows: Int[Tensor, " N"]
    """Index into the rows of the loss, ascending."""
    starts: Int[Tensor, " N"]
    """The row where each could have been taken."""
    units: Int[Tensor, " N"]
    tokens: Int[Tensor, " N"]
    """The next base token of its rest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decisions(Movable):
    """Where the teacher's next token decides the choice of units; see `alignment`."""

    rows: Int[Tensor, " Q"]
    """Index into the rows of the loss, ascending."""
    teacher_rows: Int[Tensor, " Q"]
    """Index into the flattened (B T) positions."""
    fallback_units: Int[Tensor, " Q"]
    completing: Int[Tensor, " L"]
    """Index into the decisions, ascending."""
    tokens: Int[Tensor, " L"]
    units: Int[Tensor, " L"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DistillationBatch(Movable):
    """A batch; padding is on the right, so that position ids need no shift."""

    trajectory_ids: tuple[str, ...]
    teacher_ids: Int[Tensor, "B T"]
    teacher_mask: Int[Tensor, "B T"]
    student_ids: Int[Tensor, "B S"]
    student_mask: Int[Tensor, "B S"]
    teacher_rows: Int[Tensor, " R"]
    """Index into the flattened (B T) positions."""
    student_rows: Int[Tensor, " R"]
    """Index into the flattened (B S) positions."""
    targets: RowTargets
    pendings: Pendings
    decisions: Decisions


def collate(trajectories: Sequence[AlignedTrajectory]) -> DistillationBatch:
    """Pad and flatten some aligned trajectories."""
    teacher_ids, teacher_mask = _padded([item.teacher_ids for item in trajectories])
    student_ids, student_mask = _padded([item.student_ids for item in trajectories])
    teacher_starts = [teacher_ids.shape[1] * index for index in range(len(trajectories))]
    student_starts = [student_ids.shape[1] * index for index in range(len(trajectories))]
    row_starts = _starts([len(item.target_units) for item in trajectories])
    decision_starts = _starts([len(item.decision_rows) for item in trajectories])

    def joined(name: str, offsets: Sequence[int]) -> Tensor:
        parts = [
            getattr(item, name) + offset for item, offset in zip(trajectories, offsets, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts))

    zeros = [0] * len(trajectories)
    return DistillationBatch(
        trajectory_ids=tuple(item.trajectory_id for item in trajectories),
        teacher_ids=teacher_ids,
        teacher_mask=teacher_mask,
        student_ids=student_ids,
        student_mask=student_mask,
        teacher_rows=joined("teacher_rows", teacher_starts),
        student_rows=joined("student_rows", student_starts),
        targets=RowTargets(
            tokens=joined("target_tokens", zeros),
            units=joined("target_units", zeros),
            is_sampled=joined("is_sampled", zeros).bool(),
            banned_rows=joined("banned_rows", row_starts),
            banned_tokens=joined("banned_tokens", zeros),
            num_since_latent=joined("num_since_latent", zeros),
        ),
        pendings=Pendings(
            rows=joined("pending_rows", row_starts),
            starts=joined("pending_starts", row_starts),
            units=joined("pending_units", zeros),
            tokens=joined("pending_tokens", zeros),
        ),
        decisions=Decisions(
            rows=joined("decision_rows", row_starts),
            teacher_rows=joined("decision_positions", teacher_starts),
            fallback_units=joined("fallback_units", zeros),
            completing=joined("completing_decisions", decision_starts),
            tokens=joined("completing_tokens", zeros),
            units=joined("completed_units", zeros),
        ),
    )


def _starts(lengths: Sequence[int]) -> list[int]:
    return np.cumsum([0, *lengths])[:-1].tolist()


def _padded(sequences: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    length = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    mask = torch.zeros(len(sequences), length, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask
