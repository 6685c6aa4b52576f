"""What data modules share: mine a run's trajectories, align them, load them."""

from abc import abstractmethod
from pathlib import Path

import lightning as L
from typing_extensions import override

from lar_lightning.alignment import AlignedTrajectory, align
from lar_lightning.errors import SettingError
from lar_lightning.loading import TrajectoryLoader
from lar_lightning.mining.realizations import canonical_form
from lar_lightning.runs import ensure_vocabulary, read_run, vocabulary_path
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import MiningSettings, RecordingSettings, RolloutSettings


class TrajectoryDataModule(L.LightningDataModule):
    """Trajectories of some source, aligned with their latent form."""

    def __init__(
        self,
        base_model: str,
        run_dir: Path,
        source: RolloutSettings | RecordingSettings,
        mining: MiningSettings,
        batch_size: int,
        seed: int,
        is_grouped: bool,
    ) -> None:
        """Set up the module; nothing is made before `prepare_data`."""
        super().__init__()
        if batch_size < 1:
            raise SettingError(f"`data.batch_size` must be at least 1, got {batch_size}.")
        self.base_model = base_model
        self.run_dir = Path(run_dir)
        self.source = source
        self.mining = mining
        self.batch_size = batch_size
        self.seed = seed
        self.is_grouped = is_grouped
        self.training: list[AlignedTrajectory] = []
        self.held_out: list[AlignedTrajectory] = []

    @abstractmethod
    def ensure_trajectories(self) -> None:
        """Make what is missing of the run's trajectories."""

    @override
    def prepare_data(self) -> None:
        self.ensure_trajectories()
        ensure_vocabulary(self.base_model, self.run_dir, self.source, self.mining)

    @override
    def setup(self, stage: str) -> None:
        if self.training:
            return
        vocabulary = LatentVocabulary.load(vocabulary_path(self.run_dir))
        self.training, self.held_out = (
            [
                align(vocabulary, canonical_form(trajectory, vocabulary.classes))
                for trajectory in read_run(self.run_dir, split, self.source)
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
