"""What belongs to a run in Weights & Biases besides its curves."""

from pathlib import Path
from typing import Any

import lightning as L
import yaml
from typing_extensions import override

from lar_lightning.evaluation.plots import read_curves
from lar_lightning.module import LatentActionModule
from lar_lightning.tracking.tracked_files import log_curves, log_inputs, summarize
from lar_lightning.tracking.tracked_run import tell


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
        path = Path(trainer.log_dir or pl_module.run_dir) / "config.yaml"
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None

        def begin(run: Any) -> None:
            if config is not None:
                run.config.update({"run": config}, allow_val_change=True)
            log_inputs(run, pl_module.run_dir)

        tell(trainer.loggers, begin)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LatentActionModule)
        if not trainer.is_global_zero or not trainer.global_step:
            return
        before = {
            name: {step: value for step, value in values.items() if step <= trainer.global_step}
            for name, values in read_curves(pl_module.run_dir / "logs").items()
        }
        tell(trainer.loggers, lambda run: log_curves(run, before) if run.offline else None)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LatentActionModule)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        curves = read_curves(pl_module.run_dir / "logs")
        tell(trainer.loggers, lambda run: summarize(run, curves))
