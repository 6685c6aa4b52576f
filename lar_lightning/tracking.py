"""Weights & Biases without a say in whether a run goes on."""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override


class TrackedRun(WandbLogger):
    """W&B's logger, with an end to every wait.

    Left to itself, W&B ends a run that cannot reach its server at the start, and may wait without
    end at its close. Here such a run is written to disk, and `wandb sync` brings it up later. A
    connection that is lost in between is tried again in the background while training goes on;
    where W&B's own process is lost, metrics end there, and what it has written stays on disk.
    """

    is_lost = False
    """W&B's own process has ended."""

    def __init__(
        self, *, connect_seconds: float = 30.0, finish_seconds: float = 60.0, **options: Any
    ) -> None:
        """Set up the logger.

        Args:
            connect_seconds: To wait for the server at the start, before the run is kept on disk.
            finish_seconds: To wait for what is not uploaded at the end; it stays on disk.
            options: Of Lightning's `WandbLogger`.
        """
        import wandb

        limits = wandb.Settings(init_timeout=connect_seconds, finish_timeout=finish_seconds)
        super().__init__(**options, settings=limits)

    @property
    @rank_zero_experiment
    @override
    def experiment(self) -> Any:
        from wandb.errors import CommError

        found: Any = WandbLogger.experiment
        if self._experiment is None:
            try:
                return found.fget(self)
            except CommError as error:
                rank_zero_warn(
                    f"W&B cannot be reached ({str(error).splitlines()[0]}). Training goes on, and "
                    f"the run is kept in {self.save_dir}: `wandb sync` brings it up."
                )
                self._wandb_init["mode"] = "offline"
        return found.fget(self)

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.is_lost:
            return
        try:
            super().log_metrics(metrics, step)
        except ConnectionError as error:
            self.is_lost = True
            rank_zero_warn(
                f"W&B's process has ended ({error}). Training goes on without it; what it has "
                f"written is in {self.save_dir}: `wandb sync` brings it up."
            )
