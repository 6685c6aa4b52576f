"""What a student does on held-out trajectories, teacher-forced."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    import lightning as L

    from lar_lightning.batches import DistillationBatch
    from lar_lightning.module import LatentActionModule


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Sums over rows."""

    nats: float
    """Divergence of whole trajectories."""
    folded_nats: float
    units: float
    """H_lat."""
    tokens: float
    """H_eff."""
    covered: float
    """Tokens inside latents."""
    agreeing: float
    """Rows whose likeliest token is the teacher's."""


@torch.no_grad()
def measured(trainer: "L.Trainer", module: "LatentActionModule") -> HeldOut:
    """Read all held-out trajectories as they are written at present, in all processes."""
    sums = torch.zeros(6, device=module.device)
    for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
        sums += _sums(module, batch.to(module.device))
    total: Any = trainer.strategy.reduce(sums, reduce_op="sum")
    nats, folded_nats, units, tokens, covered, agreeing = total.tolist()
    return HeldOut(
        nats=nats,
        folded_nats=folded_nats,
        units=units,
        tokens=tokens,
        covered=covered,
        agreeing=agreeing,
    )


def _sums(module: "LatentActionModule", batch: "DistillationBatch") -> Float[Tensor, "6"]:
    _, terms = module.compare(batch)
    student = module.student
    latents = batch.targets.units - student.base_size
    lengths = student.unit_lengths[latents.clamp_min(-1)]
    parts = (
        (terms.folded + terms.split).sum(),
        terms.folded.sum(),
        lengths.new_tensor(len(lengths)),
        lengths.sum(),
        lengths[latents >= 0].sum(),
        terms.agrees.sum(),
    )
    return torch.stack([part.float() for part in parts])
