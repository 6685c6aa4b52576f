"""Rollouts of the base model itself: roll out, mine, align."""

from pathlib import Path

from typing_extensions import override

from data_modules.trajectories import TrajectoryDataModule
from lar_lightning.runs import ensure_rollouts
from lar_lightning.settings import MiningSettings, RolloutSettings, TooLong


class RolloutDataModule(TrajectoryDataModule):
    """The base model's own trajectories on a benchmark, aligned with their latent form."""

    def __init__(
        self,
        base_model: str,
        benchmark: str,
        run_dir: Path,
        rollouts: RolloutSettings = RolloutSettings(),
        mining: MiningSettings = MiningSettings(),
        batch_size: int = 8,
        seed: int = 0,
        is_grouped: bool = False,
        max_tokens: int | None = None,
        too_long: TooLong = "skip",
    ) -> None:
        """Set up the module; nothing is made before `prepare_data`.

        Args:
            base_model: Folder, hub id or `pypi:<distribution>`.
            benchmark: Name of the benchmark whose tasks are rolled out.
            run_dir: Folder of the run.
            rollouts: What is rolled out.
            mining: What may become a latent action.
            batch_size: Trajectories a step and process.
            seed: Of the order of training trajectories.
            is_grouped: Samples of one task come in one batch, which reads their prompt once: faster
                and leaner, with less variety in a step.
            max_tokens: Longest trajectory in expanded tokens; None: what `base_model` reads.
            too_long: Longer ones are left out, or cut behind the last action that fits.
        """
        super().__init__(
            base_model,
            run_dir,
            rollouts,
            mining,
            batch_size,
            seed,
            is_grouped,
            max_tokens,
            too_long,
        )
        self.benchmark = benchmark
        self.rollouts = rollouts

    @override
    def ensure_trajectories(self) -> None:
        ensure_rollouts(self.base_model, self.benchmark, self.run_dir, self.rollouts)
