"""Whether the new rows learn, and how far they go."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lar_lightning.errors import SettingError
from lar_lightning.metrics.records import record
from lar_lightning.models.embeddings import initial_rows
from lar_lightning.module import LatentActionModule
from lar_lightning.run_folder import vocabulary_path
from lar_lightning.segments import LatentVocabulary


class RowMonitor(L.Callback):
    """Norms of the new rows, of their gradients, and of what is trained beside them.

    Gradients are those of the step to come, before they are clipped, the mean of all processes;
    weights are those before the step.

    Metrics recorded, for `input` and `output` rows:
        rows/input_norm_mean, rows/input_norm_max: of the rows.
        rows/input_distance_mean, rows/input_distance_max: from where each row started, by the norm
            that it had there.
        rows/input_gradient_norm_mean, rows/input_gradient_norm_max: of their gradients.
        rows/input_touched_share: share of rows whose gradient is not zero.
    Where more is trained:
        weights/norm, weights/gradient_norm: of adapters, or of the base weights.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        """Set up the monitor.

        Args:
            every_n_steps: Steps between figures; default: as the trainer logs.
        """
        if every_n_steps is not None and every_n_steps < 1:
            raise SettingError(
                f"`RowMonitor.every_n_steps` must be at least 1, got {every_n_steps}."
            )
        self.every_n_steps = every_n_steps
        self.starts: dict[str, Tensor] = {}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LatentActionModule)
        student = pl_module.student
        frozen: Any = student.teacher or student.model  # a resumed run finds the same matrices
        segments = LatentVocabulary.load(vocabulary_path(pl_module.run_dir)).segments
        matrices = {
            "input": frozen.get_input_embeddings().weight,
            "output": frozen.get_output_embeddings().weight,
        }
        self.starts = {
            side: initial_rows(
                whole(matrix.detach())[: student.base_size].cpu(),  # widened: a device may be full
                segments,
                side,  # type: ignore[arg-type]
                pl_module.hparams["initialization"],
            ).to(pl_module.device)
            for side, matrix in matrices.items()
            if segments
        }

    @override
    def on_before_optimizer_step(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        assert isinstance(pl_module, LatentActionModule)
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or trainer.global_step % every:
            return
        values: dict[str, Tensor] = {}
        rows = pl_module.student.rows
        for side, start in self.starts.items():
            parameter = getattr(rows, f"{side}_rows")
            figures = row_figures(whole(parameter.detach()), start, parameter.grad)
            values |= {f"rows/{side}_{name}": value for name, value in figures.items()}
        others = pl_module.student.other_parameters
        if others:
            values["weights/norm"] = total_norm([p.detach() for p in others])
            gradients = [p.grad for p in others if p.grad is not None]
            if gradients:  # none while new rows are grounded
                values["weights/gradient_norm"] = total_norm(gradients)
        # One transfer from the device for all of them.
        numbers = torch.stack([value.float() for value in values.values()]).tolist()
        record(trainer, dict(zip(values, numbers, strict=True)))


def row_figures(rows: Tensor, start: Tensor, gradient: Tensor | None) -> dict[str, Tensor]:
    """Return the figures of one matrix of rows."""
    norms = rows.norm(dim=1)
    distances = (rows - start.to(rows)).norm(dim=1) / start.to(rows).norm(dim=1).clamp_min(1e-12)
    gradients = (torch.zeros_like(rows) if gradient is None else whole(gradient)).norm(dim=1)
    return {
        "norm_mean": norms.mean(),
        "norm_max": norms.max(),
        "distance_mean": distances.mean(),
        "distance_max": distances.max(),
        "gradient_norm_mean": gradients.mean(),
        "gradient_norm_max": gradients.max(),
        "touched_share": (gradients > 0).float().mean(),
    }


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Return the norm of several tensors as one."""
    return whole(torch.nn.utils.get_total_norm(tensors))


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that processes share out as all of it; they must ask together."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
