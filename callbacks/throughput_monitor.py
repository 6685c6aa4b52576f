"""How fast training is, what it waits for, how much memory it takes."""

import resource
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lar_lightning.batches import DistillationBatch
from lar_lightning.errors import SettingError
from lar_lightning.metrics.generations import Generation
from lar_lightning.metrics.operations import measured_peak, size_of, step_operations
from lar_lightning.metrics.records import record
from lar_lightning.module import LatentActionModule

GIB = 2**30
COUNTS = ("tokens", "units", "rows", "operations")


class ThroughputMonitor(L.Callback):
    """Counts what training reads, of all processes, over its own time.

    That is the time of steps and of making batches; validation, checkpoints and texts that the
    student writes are left out of it. Figures are of the steps since those before. On-policy steps
    count as the batch that they replace.

    Metrics recorded:
        throughput/expanded_tokens_per_second: base tokens of trajectories; each counts once,
            whoever reads it in whatever form.
        throughput/units_per_second: units that the student reads for them.
        throughput/rows_per_second: rows in the loss.
        throughput/step_seconds: mean time of a batch, of the slowest process.
        throughput/data_wait_share: share of the time that was spent on making batches; where the
            loader counts it (`seconds_loading`).
        throughput/total_expanded_tokens: since the run began; goes on where a run is resumed.
        throughput/flop_utilization: the model's operations (`lar_lightning.metrics.operations`) by
            those of the peak in that time. Shared prompts are read once, so it may be above what
            the processor does.
        throughput/peak_tflops: that peak, of one process.
        memory/peak_process_gib: most memory of a process so far.
        memory/peak_device_gib: most memory of a CUDA device that was allocated at once so far.
    """

    def __init__(self, every_n_steps: int | None = None, peak_tflops: float | None = None) -> None:
        """Set up the monitor.

        Args:
            every_n_steps: Steps between figures; default: as the trainer logs.
            peak_tflops: Operations a second that one process's device can do at most, in 10^12; by
                default the speed of a matrix product is measured before training, in 0.3 s.
        """
        if every_n_steps is not None and every_n_steps < 1:
            raise SettingError(
                f"`ThroughputMonitor.every_n_steps` must be at least 1, got {every_n_steps}."
            )
        if peak_tflops is not None and not peak_tflops > 0:
            raise SettingError(
                f"`ThroughputMonitor.peak_tflops` must be above 0, got {peak_tflops}."
            )
        self.every_n_steps = every_n_steps
        self.peak = None if peak_tflops is None else peak_tflops * 1e12
        self.total_tokens = 0
        self._begin()

    def _begin(self) -> None:
        self._seconds, self._num_batches, self._other_seconds = 0.0, 0, 0.0
        self._counts: Tensor | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LatentActionModule)
        self._size = size_of(pl_module.student)
        if self.peak is None:
            self.peak = measured_peak(pl_module.device, pl_module.student.heads.teacher.dtype)
        self._begin()
        self._loading = self._seconds_loading(trainer)
        self._last_step = trainer.global_step

    def _seconds_loading(self, trainer: L.Trainer) -> float | None:
        return getattr(trainer.train_dataloader, "seconds_loading", None)

    @override
    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: DistillationBatch,
        batch_idx: int,
    ) -> None:
        self._other_seconds = 0.0
        self._start = time.perf_counter()

    def on_generation(
        self, trainer: L.Trainer, pl_module: L.LightningModule, generation: Generation
    ) -> None:
        """Leave the time for texts out of the step in which they were written."""
        self._other_seconds += generation.seconds

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: DistillationBatch,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, LatentActionModule)
        self._seconds += time.perf_counter() - self._start - self._other_seconds
        self._num_batches += 1
        operations = step_operations(
            self._size, batch, is_cached=pl_module.teacher_cache is not None
        )
        counts = torch.stack(
            [
                batch.teacher_mask.sum().double(),
                batch.student_mask.sum().double(),
                torch.tensor(float(len(batch.targets)), device=operations.device).double(),
                operations,
            ]
        )
        # At every step, so that each checkpoint knows the total of all processes.
        counts = _reduced(trainer, counts, "sum")
        self.total_tokens += int(counts[0])
        self._counts = counts if self._counts is None else self._counts + counts
        step = trainer.global_step
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step != self._last_step and every and step % every == 0:
            record(trainer, self._figures(trainer))
            self._begin()
            self._loading = self._seconds_loading(trainer)
        self._last_step = step

    def _figures(self, trainer: L.Trainer) -> dict[str, float]:
        assert self._counts is not None
        assert self.peak is not None
        loading = self._seconds_loading(trainer)
        waited = (loading or 0.0) - (self._loading or 0.0)
        device = self._counts.device
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        on_device = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0
        own = [self._seconds, waited, usage, on_device]
        seconds, waited, usage, on_device = _reduced(
            trainer, torch.tensor(own, device=device, dtype=torch.float64), "max"
        ).tolist()
        whole = seconds + waited
        counts = dict(zip(COUNTS, self._counts.tolist(), strict=True))
        figures = {
            "throughput/expanded_tokens_per_second": counts["tokens"] / whole,
            "throughput/units_per_second": counts["units"] / whole,
            "throughput/rows_per_second": counts["rows"] / whole,
            "throughput/step_seconds": whole / self._num_batches,
            "throughput/total_expanded_tokens": self.total_tokens,
            "throughput/flop_utilization": counts["operations"]
            / (whole * self.peak * trainer.world_size),
            "throughput/peak_tflops": self.peak / 1e12,
            "memory/peak_process_gib": usage,
        }
        if loading is not None:
            figures["throughput/data_wait_share"] = waited / whole
        if device.type == "cuda":
            figures["memory/peak_device_gib"] = on_device
        return figures

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"total_tokens": self.total_tokens}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total_tokens = state_dict["total_tokens"]


def _reduced(trainer: L.Trainer, values: Tensor, how: str) -> Tensor:
    """Return the sums or maxima over all processes."""
    reduced = trainer.strategy.reduce(values, reduce_op=how)
    assert isinstance(reduced, Tensor)
    return reduced
