"""Goes on in another turn where a cluster ends this one."""

import os
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lar_lightning.recovery.requeue import Listener, SlurmJob, leave, validation_to_repeat
from lar_lightning.run_folder import checkpoint_path


class Requeue(L.Callback):
    """Saves, asks SLURM to start the job again, and stops, when SIGUSR1 or SIGTERM comes.

    Lightning's own way saves inside the signal's handler, where processes meet in different places
    and wait for each other for ever. Here a handler only notes; all processes agree at the end of
    a batch, of training or of validation. Before the first batch nothing is half-written, and the
    first process leaves at once.

    Outside SLURM the run is saved and ends with 128 and the signal's number.
    """

    def __init__(self, run_dir: Path, every_n_steps: int = 1, max_idle_turns: int = 2) -> None:
        """Begin to listen.

        Args:
            run_dir: Folder of the run; the command line fills it in.
            every_n_steps: How often processes ask each other for a signal. Each time costs one
                exchange of one number.
            max_idle_turns: Turns in a row after which the job is not requeued, because they made
                no step and finished no rollout.
        """
        self.run_dir = Path(run_dir)
        self.every_n_steps = every_n_steps
        self.max_idle_turns = max_idle_turns
        self.job = SlurmJob.of(os.environ)
        self.is_within_validation = False
        self.listener = Listener(self._leave_at_once)

    @override
    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listener.listen()  # Lightning has taken SIGTERM over

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listener.listen()
        self.listener.only_note()

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Within an accumulation there are gradients that no checkpoint holds.
        is_stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if not is_stepped or trainer.global_step % self.every_n_steps:
            return
        loop = trainer.fit_loop
        if loop._data_fetcher and loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            return  # a run that goes on from here would leave this validation out
        number = self._agreed(trainer, pl_module)
        if number:
            trainer._logger_connector.update_train_step_metrics()  # comes only after this hook
            self._stop(trainer, number)

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            number = self._agreed(trainer, pl_module)
            if number:
                self.is_within_validation = True
                self._stop(trainer, number)

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.is_within_validation:
            validation_to_repeat(checkpoint)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.listener.close()

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.listener.only_note()  # the run is ending: a signal would only disturb that

    def _agreed(self, trainer: L.Trainer, pl_module: L.LightningModule) -> int:
        """Return the number of the signal that any process has noted, 0 without one."""
        noted = torch.tensor(float(self.listener.noted), device=pl_module.device)
        return int(trainer.strategy.reduce(noted, reduce_op="max"))

    def _stop(self, trainer: L.Trainer, number: int) -> NoReturn:
        trainer.save_checkpoint(checkpoint_path(self.run_dir))
        saved = f"saved {checkpoint_path(self.run_dir)} after step {trainer.global_step}"
        # One process tells the outcome; where another began it, 0 does not look like its death.
        raise SystemExit(self._leave(number, saved) if trainer.is_global_zero else 0)

    def _leave_at_once(self, number: int) -> None:
        if self.job is not None and not self.job.is_first_process:
            return  # it waits for the first process, with which SLURM ends all others
        self.listener.only_note()
        raise SystemExit(self._leave(number, "training had not begun, what is finished is kept"))

    def _leave(self, number: int, saved: str) -> int:
        return leave(self.job, self.run_dir, number, saved, self.max_idle_turns)
