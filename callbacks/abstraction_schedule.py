"""Finds the largest executable vocabulary: more and more latents, until the student collapses."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from typing_extensions import override

from callbacks.collapse_detection import CollapseDetection
from lar_lightning.abstraction.curve import StageResult, verdict, write_curve
from lar_lightning.abstraction.held_out import measured
from lar_lightning.abstraction.stages import check_order, sizes_by_rate, sizes_by_share
from lar_lightning.collapse.actions import reset_optimizers, restore_weights
from lar_lightning.errors import SettingError
from lar_lightning.mining.corpus import corpus_of
from lar_lightning.module import LatentActionModule
from lar_lightning.run_folder import vocabulary_path
from lar_lightning.segments import LatentVocabulary
from lar_lightning.stages import read_run

STATE = ("sizes", "stage", "held", "results", "is_finished", "alarms_before")


class AbstractionSchedule(L.Callback):
    """Raises the reparameterization rate in stages, the most certain latents first (paper 5.3).

    The module has rows for the whole vocabulary, of which a stage has the first ones in play:
    trajectories are written with them alone, and the others get neither probability nor gradient.
    A stage has `trainer.max_epochs` over the number of stages, a cycle of the learning rate of its
    own, new optimizers, and begins with what the last one has learnt. At its end the held-out
    divergence is measured. Where that is within the limit and `CollapseDetection`, if there is one,
    had no alarm, the stage holds, and the next one begins. Otherwise the weights of the last stage
    that held are put back, and training stops.

    `run_dir/metrics/abstraction.csv` is the curve. `run_dir/boundary_vocabulary.json` are the
    latents of the last stage that held; `export` and what reads it take these alone.
    """

    def __init__(
        self,
        max_nats_per_token: float,
        shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0),
        rates: tuple[float, ...] | None = None,
        score: str = "gen/success_rate",
        min_score: float | None = None,
    ) -> None:
        """Set up the schedule.

        Args:
            max_nats_per_token: Largest held-out divergence a stage may end with, in nats per
                expanded token.
            shares: Of the latents in each stage.
            rates: Instead, the share of training action tokens inside latents at each stage.
            score: Metric of a small probe set, read where something logs it.
            min_score: Its least value for a stage to hold; None only notes it.
        """
        if not max_nats_per_token > 0:
            raise SettingError(
                f"`max_nats_per_token` must be above 0, got {max_nats_per_token}: the divergence "
                "of a student from its teacher is never below."
            )
        self.max_nats_per_token, self.score, self.min_score = max_nats_per_token, score, min_score
        self.shares, self.rates = tuple(shares), None if rates is None else tuple(rates)
        self.sizes: list[int] = []
        self.stage = 0
        self.held = 0
        """Stages that held; 0 is the student before training, without latents."""
        self.results: list[dict[str, Any]] = []
        self.is_finished = False
        self.alarms_before = 0

    def check_run(
        self, trainer: L.Trainer, pl_module: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Refuse what does not go together; `fit` asks before any work.

        Raises:
            SettingError: naming the setting of trainer, module or another callback.
        """
        if _is_dry(trainer):
            return
        assert isinstance(pl_module, LatentActionModule)
        number = self.num_stages
        epochs = trainer.max_epochs or 0
        if epochs < 1 or epochs % max(number, 1):
            raise SettingError(
                f"`trainer.max_epochs` must be a multiple of the {number} stages of "
                f"AbstractionSchedule, got {trainer.max_epochs}. Set it to {number}, or more for "
                "stages of several epochs."
            )
        if trainer.max_steps != -1:
            raise SettingError(
                "`trainer.max_steps` must be -1, no limit, with AbstractionSchedule, whose stages "
                f"are epochs, got {trainer.max_steps}. Set `trainer.limit_train_batches` for "
                "shorter stages."
            )
        if pl_module.on_policy.share and pl_module.on_policy.engine == "vllm":
            raise SettingError(
                "`on_policy.engine` must be auto or transformers with AbstractionSchedule, got "
                "vllm, which writes latents of later stages too."
            )
        detection = self._detection(trainer)
        if detection is not None and set(detection.actions) - {"warn"}:
            raise SettingError(
                "`actions` of CollapseDetection must be warn alone beside AbstractionSchedule, "
                f"which goes back itself, got {', '.join(detection.actions)}."
            )

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or _is_dry(trainer):
            return
        assert isinstance(pl_module, LatentActionModule)
        self.check_run(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        pl_module.num_cycles = self.num_stages

    @property
    def num_stages(self) -> int:
        """Return how many stages are asked for."""
        return len(self.shares if self.rates is None else self.rates)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.sizes and not _is_dry(trainer):
            self.sizes = list(self._sizes(trainer))
        self._apply(trainer, pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Where processes share out the model, a checkpoint's state comes behind `on_fit_start`.
        self._apply(trainer, pl_module)
        if self.is_finished:
            self._say(trainer, "finished before")
            trainer.should_stop = True
        elif self.sizes and not trainer.global_step:
            self._keep(trainer)

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._apply(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._apply(trainer, pl_module)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._apply(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._apply(trainer, pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.is_finished or not self.sizes:
            return
        epochs = (trainer.max_epochs or 0) // len(self.sizes)
        is_over = trainer.is_last_batch and (trainer.current_epoch + 1) % epochs == 0
        if is_over or self._num_alarms(trainer):
            assert isinstance(pl_module, LatentActionModule)
            self._judge(trainer, pl_module)

    def _judge(self, trainer: L.Trainer, module: LatentActionModule) -> None:
        """Measure the stage, and go on or back."""
        held_out = measured(trainer, module)
        score = trainer.callback_metrics.get(self.score)
        score = None if score is None else float(score)
        nats = held_out.nats / held_out.tokens
        reason = verdict(
            nats, self.max_nats_per_token, self._num_alarms(trainer), score, self.min_score
        )
        result = StageResult.of(
            held_out,
            stage=self.stage + 1,
            step=trainer.global_step,
            num_latents=self.sizes[self.stage],
            score=score,
            holds=not reason,
            reason=reason,
        )
        self.results.append(asdict(result))
        self._report(trainer, result)
        if reason:
            self._go_back(trainer, module)
            return
        self.held = self.stage + 1
        self._keep(trainer)
        if self.held == len(self.sizes):
            self._finish(trainer)
            return
        self.stage += 1
        self._restart_detection(trainer)
        reset_optimizers(trainer)

    def _go_back(self, trainer: L.Trainer, module: LatentActionModule) -> None:
        restore_weights(trainer, self._path(trainer))
        self.stage = self.held - 1
        self._finish(trainer)
        self._apply(trainer, module)
        trainer.should_stop = True

    def _finish(self, trainer: L.Trainer) -> None:
        self.is_finished = True
        self._restart_detection(trainer)
        size = self.sizes[self.held - 1] if self.held else 0
        run_dir = Path(trainer.default_root_dir)
        path = run_dir / "boundary_vocabulary.json"
        if trainer.is_global_zero:
            LatentVocabulary.load(vocabulary_path(run_dir)).first(size).save(path)
        beyond = "the boundary was not reached" if self.held == len(self.sizes) else "boundary"
        self._say(trainer, f"{beyond}: {size} of {self.sizes[-1]} latents hold, see {path}")

    def _report(self, trainer: L.Trainer, result: StageResult) -> None:
        if not trainer.is_global_zero:
            return
        write_curve(Path(trainer.default_root_dir) / "metrics" / "abstraction.csv", self.results)
        values = {
            f"abstraction/{name}": float(value)
            for name, value in vars(result).items()
            if isinstance(value, int | float)
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)
        self._say(trainer, str(result))

    def _sizes(self, trainer: L.Trainer) -> tuple[int, ...]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        vocabulary = LatentVocabulary.load(vocabulary_path(Path(trainer.default_root_dir)))
        check_order(vocabulary)
        if self.rates is None:
            return sizes_by_share(len(vocabulary), self.shares)
        corpus = corpus_of(read_run(data.run_dir, "train", data.source))
        return sizes_by_rate(vocabulary, corpus, self.rates)

    def _apply(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Bring model and data to the stage; nothing where they are there."""
        assert isinstance(module, LatentActionModule)
        if not self.sizes:
            return
        size = self.sizes[self.stage] if self.stage >= 0 else 0
        if module.student.num_active != size:
            module.activate(size)
        trainer.datamodule.activate(size)  # type: ignore[attr-defined]

    def _detection(self, trainer: L.Trainer) -> CollapseDetection | None:
        found = [c for c in trainer.callbacks if isinstance(c, CollapseDetection)]  # type: ignore[attr-defined]
        return found[0] if found else None

    def _num_alarms(self, trainer: L.Trainer) -> int:
        detection = self._detection(trainer)
        return detection.num_alarms - self.alarms_before if detection is not None else 0

    def _restart_detection(self, trainer: L.Trainer) -> None:
        detection = self._detection(trainer)
        if detection is not None:
            detection.restart(trainer.global_step)
            self.alarms_before = detection.num_alarms

    def _path(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints" / "held.ckpt"

    def _keep(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self._path(trainer), weights_only=True)

    def _say(self, trainer: L.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            print(f"abstraction: {text}", flush=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state_dict[name])


def _is_dry(trainer: L.Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))
