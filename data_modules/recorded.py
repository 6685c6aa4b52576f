"""Recordings of other agents: import, mine, align."""

from pathlib import Path

from typing_extensions import override

from data_modules.trajectories import TrajectoryDataModule
from lar_lightning.runs import ensure_recordings
from lar_lightning.settings import MiningSettings, RecordingSettings, TooLong


class RecordedDataModule(TrajectoryDataModule):
    """Trajectories that other agents recorded, as the base model would write them, aligned."""

    def __init__(
        self,
        base_model: str,
        run_dir: Path,
        recordings: RecordingSettings,
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
            run_dir: Folder of the run.
            recordings: What is imported.
            mining: What may become a latent action.
            batch_size: Trajectories a step and process.
            seed: Of the order of training trajectories.
            is_grouped: Trajectories of one prompt come in one batch, which reads it once.
            max_tokens: Longest trajectory in expanded tokens; None: what `base_model` reads.
            too_long: Longer ones are left out, or cut behind the last action that fits.
        """
        super().__init__(
            base_model,
            run_dir,
            recordings,
            mining,
            batch_size,
            seed,
            is_grouped,
            max_tokens,
            too_long,
        )
        self.recordings = recordings

    @override
    def ensure_trajectories(self) -> None:
        ensure_recordings(self.base_model, self.run_dir, self.recordings)
