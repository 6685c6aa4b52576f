"""What belongs to a run in Weights & Biases besides its curves."""

from pathlib import Path

import lightning as L
import yaml
from typing_extensions import override

from lar_lightning.evaluation.plots import read_curves
from lar_lightning.module import LatentActionModule
from lar_lightning.tracked_files import log_curves, log_inputs, summarize
from lar_lightning.tracking import tracked_runs


class TrackedArtefacts(L.Callback):
    """Tells W&B the whole configuration, the trajectories, the vocabulary, and a summary.

    Logged at the start of training: the configuration as `config.run`; trajectories (as what was
    read) and the latent vocabulary (as what was made); the table `latents/vocabulary`. At its end:
    the first and best value of each validation metric, as `start/val/...` and `best/val/...`. The
    verb `track` adds what later verbs make. Without a W&B logger it does nothing.

    A process of W&B that is killed takes up to 15 seconds of what it was told with it. So a run
    that goes on offline begins by telling what the CSV log has: each of its offline folders holds
    the whole run so far, and the last one is enough.
    """

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LatentActionModule)
        if not trainer.is_global_zero:
            return
        for run in tracked_runs(trainer.loggers):
            config = Path(trainer.log_dir or pl_module.run_dir) / "config.yaml"
            if config.exists():
                content = yaml.safe_load(config.read_text(encoding="utf-8"))
                run.config.update({"run": content}, allow_val_change=True)
            log_inputs(run, pl_module.run_dir)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LatentActionModule)
        if not trainer.is_global_zero or not trainer.global_step:
            return
        before = {
            name: {step: value for step, value in values.items() if step <= trainer.global_step}
            for name, values in read_curves(pl_module.run_dir / "logs").items()
        }
        for run in tracked_runs(trainer.loggers):
            if run.offline:
                log_curves(run, before)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LatentActionModule)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        for run in tracked_runs(trainer.loggers):
            summarize(run, read_curves(pl_module.run_dir / "logs"))
