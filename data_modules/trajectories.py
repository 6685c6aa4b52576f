"""What data modules share: mine a run's trajectories, align them, load them."""

from abc import abstractmethod
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lar_lightning.alignment import AlignedTrajectory, align, padded
from lar_lightning.base_models import context_length
from lar_lightning.errors import SettingError
from lar_lightning.loading import TrajectoryLoader
from lar_lightning.mining.realizations import canonical_form
from lar_lightning.run_folder import Split, base_checkpoint, vocabulary_path
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import (
    LoadingSettings,
    MiningSettings,
    RecordingSettings,
    RolloutSettings,
)
from lar_lightning.stages import ensure_vocabulary, read_run
from lar_lightning.trajectories import Trajectory, fitted

SPLITS: tuple[Split, ...] = ("train", "held_out")


class TrajectoryDataModule(L.LightningDataModule):
    """Trajectories of some source, aligned with their latent form."""

    def __init__(
        self,
        base_model: str,
        run_dir: Path,
        source: RolloutSettings | RecordingSettings,
        mining: MiningSettings,
        loading: LoadingSettings,
    ) -> None:
        """Set up the module; nothing is made before `prepare_data`."""
        super().__init__()
        # The run's folder is shared by all nodes: one process of all makes what is missing.
        self.prepare_data_per_node = False
        self.base_model = base_model
        self.run_dir = Path(run_dir)
        self.source = source
        self.mining = mining
        self.loading = loading
        self.training: list[AlignedTrajectory] = []
        self.held_out: list[AlignedTrajectory] = []
        self.num_active: int | None = None
        self._realigned: dict[Split, list[AlignedTrajectory]] = {}
        self._loaders: list[tuple[Split, TrajectoryLoader]] = []

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
        self.training = self._read(vocabulary, "train")
        self.held_out = self._read(vocabulary, "held_out")

    def activate(self, num_latents: int) -> None:
        """Write trajectories with the first latents alone, also for loaders that are in use.

        Between epochs only: an epoch that has begun keeps its order.
        """
        if num_latents == self.num_active:
            return
        vocabulary = LatentVocabulary.load(vocabulary_path(self.run_dir)).first(num_latents)
        self._realigned = {split: self._read(vocabulary, split) for split in SPLITS}
        self.num_active = num_latents
        for split, loader in self._loaders:
            loader.realign(self._realigned[split])

    def _read(self, vocabulary: LatentVocabulary, split: Split) -> list[AlignedTrajectory]:
        return [self._aligned(vocabulary, trajectory) for trajectory in self._fitting(split)]

    def _aligned(self, vocabulary: LatentVocabulary, trajectory: Trajectory) -> AlignedTrajectory:
        aligned = align(vocabulary, canonical_form(trajectory, vocabulary.classes))
        return padded(aligned, vocabulary) if self.loading.is_padded else aligned

    def _fitting(self, split: Split) -> list[Trajectory]:
        """Return the trajectories of a split that the student can be trained on."""
        whole = read_run(self.run_dir, split, self.source)
        limit = self.loading.max_tokens or context_length(base_checkpoint(self.base_model))
        if limit is None:
            return whole
        is_cut = self.loading.too_long == "truncate"
        kept = [fitted(trajectory, limit, is_cut=is_cut) for trajectory in whole]
        fitting = [trajectory for trajectory in kept if trajectory is not None]
        if not fitting:
            raise SettingError(
                f"`loading.max_tokens` must hold a trajectory, got {limit} where the shortest of "
                f"{split} has {min(len(item.token_ids) for item in whole)} tokens. Raise it as far "
                "as `base_model` reads, or set `loading.too_long` to truncate."
            )
        num_cut = sum(new is not old for new, old in zip(kept, whole, strict=True) if new)
        if num_cut or len(fitting) < len(whole):
            rank_zero_warn(
                f"{split}: of {len(whole)} trajectories, {len(whole) - len(fitting)} are left out "
                f"and {num_cut} are cut behind an action: longer than {limit} tokens "
                "(`loading.max_tokens`, `loading.too_long`)."
            )
        return fitting

    @override
    def train_dataloader(self) -> TrajectoryLoader:
        return self._loader("train")

    @override
    def val_dataloader(self) -> TrajectoryLoader:
        return self._loader("held_out")

    @override
    def test_dataloader(self) -> TrajectoryLoader:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> TrajectoryLoader:
        return self.val_dataloader()

    def _loader(self, split: Split) -> TrajectoryLoader:
        trainer, is_training = self.trainer, split == "train"
        loader = TrajectoryLoader(
            self.training if is_training else self.held_out,
            batch_size=self.loading.batch_size,
            seed=self.loading.seed,
            is_shuffled=is_training,
            # Validation has no variety to lose.
            is_grouped=self.loading.is_grouped or not is_training,
            rank=trainer.global_rank if trainer else 0,
            num_ranks=trainer.world_size if trainer else 1,
        )
        # Made of all latents first: by them it knows whether a checkpoint's position is its own.
        if split in self._realigned:
            loader.realign(self._realigned[split])
        self._loaders.append((split, loader))
        return loader
