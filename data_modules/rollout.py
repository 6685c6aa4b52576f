"""Rollouts of the base model itself: roll out, mine, align."""

from pathlib import Path

from typing_extensions import override

from data_modules.trajectories import TrajectoryDataModule
from lar_lightning.settings import LoadingSettings, MiningSettings, RolloutSettings
from lar_lightning.stages import ensure_rollouts


class RolloutDataModule(TrajectoryDataModule):
    """The base model's own trajectories on a benchmark, aligned with their latent form."""

    def __init__(
        self,
        base_model: str,
        benchmark: str,
        run_dir: Path,
        rollouts: RolloutSettings = RolloutSettings(),
        mining: MiningSettings = MiningSettings(),
        loading: LoadingSettings = LoadingSettings(),
    ) -> None:
        """Set up the module; nothing is made before `prepare_data`.

        Args:
            base_model: Folder, hub id or `pypi:<distribution>`.
            benchmark: Name of the benchmark whose tasks are rolled out.
            run_dir: Folder of the run.
            rollouts: What is rolled out.
            mining: What may become a latent action.
            loading: How trajectories come to training.
        """
        super().__init__(base_model, run_dir, rollouts, mining, loading)
        self.benchmark = benchmark
        self.rollouts = rollouts

    @override
    def ensure_trajectories(self) -> None:
        ensure_rollouts(self.base_model, self.benchmark, self.run_dir, self.rollouts)
