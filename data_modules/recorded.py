"""Recordings of other agents: import, mine, align."""

from pathlib import Path

from typing_extensions import override

from data_modules.trajectories import TrajectoryDataModule
from lar_lightning.settings import LoadingSettings, MiningSettings, RecordingSettings
from lar_lightning.stages import ensure_recordings


class RecordedDataModule(TrajectoryDataModule):
    """Trajectories that other agents recorded, as the base model would write them, aligned."""

    def __init__(
        self,
        base_model: str,
        run_dir: Path,
        recordings: RecordingSettings,
        mining: MiningSettings = MiningSettings(),
        loading: LoadingSettings = LoadingSettings(),
    ) -> None:
        """Set up the module; nothing is made before `prepare_data`.

        Args:
            base_model: Folder, hub id or `pypi:<distribution>`.
            run_dir: Folder of the run.
            recordings: What is imported.
            mining: What may become a latent action.
            loading: How trajectories come to training.
        """
        super().__init__(base_model, run_dir, recordings, mining, loading)
        self.recordings = recordings

    @override
    def ensure_trajectories(self) -> None:
        ensure_recordings(self.base_model, self.run_dir, self.recordings)
