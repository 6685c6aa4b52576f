"""Rollouts of the base model itself: roll out, mine, align."""

from pathlib import Path

import lightning as L
from typing_extensions import override

from lar_lightning.alignment import AlignedTrajectory, align
from lar_lightning.errors import SettingError
from lar_lightning.loading import TrajectoryLoader
from lar_lightning.rollouts import read_split
from lar_lightning.runs import ensure_rollouts, ensure_vocabulary, vocabulary_path
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import MiningSettings, RolloutSettings


class RolloutDataModule(L.LightningDataModule):
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
        """
        super().__init__()
        if batch_size < 1:
            raise SettingError(f"`data.batch_size` must be at least 1, got {batch_size}.")
        self.base_model = base_model
        self.benchmark = benchmark
        self.run_dir = Path(run_dir)
        self.rollouts = rollouts
        self.mining = mining
        self.batch_size = batch_size
        self.seed = seed
        self.is_grouped = is_grouped
        self.training: list[AlignedTrajectory] = []
        self.held_out: list[AlignedTrajectory] = []

    @override
    def prepare_data(self) -> None:
        ensure_rollouts(self.base_model, self.benchmark, self.run_dir, self.rollouts)
        ensure_vocabulary(self.base_model, self.run_dir, self.rollouts, self.mining)

    @override
    def setup(self, stage: str) -> None:
        if self.training:
            return
        vocabulary = LatentVocabulary.load(vocabulary_path(self.run_dir))
        self.training, self.held_out = (
            [
                align(vocabulary, trajectory)
                for trajectory in read_split(self.run_dir, split, self.rollouts)
            ]
            for split in ("train", "held_out")
        )

    @override
    def train_dataloader(self) -> TrajectoryLoader:
        return self._loader(self.training, is_shuffled=True)

    @override
    def val_dataloader(self) -> TrajectoryLoader:
        return self._loader(self.held_out, is_shuffled=False)

    @override
    def test_dataloader(self) -> TrajectoryLoader:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> TrajectoryLoader:
        return self.val_dataloader()

    def _loader(
        self, trajectories: list[AlignedTrajectory], *, is_shuffled: bool
    ) -> TrajectoryLoader:
        trainer = self.trainer
        return TrajectoryLoader(
            trajectories,
            batch_size=self.batch_size,
            seed=self.seed,
            is_shuffled=is_shuffled,
            # Validation has no variety to lose.
            is_grouped=self.is_grouped or not is_shuffled,
            rank=trainer.global_rank if trainer else 0,
            num_ranks=trainer.world_size if trainer else 1,
        )
