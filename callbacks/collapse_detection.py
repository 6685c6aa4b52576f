"""Notices that a student stops being one, and does something about it."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lar_lightning.batches import DistillationBatch
from lar_lightning.collapse import DEFAULT_SIGNALS, Alarm, Monitor, Signal
from lar_lightning.collapse.actions import (
    agreed,
    announce,
    restore_weights,
    say,
    scale_learning_rate,
)
from lar_lightning.collapse.steps import step_signals
from lar_lightning.collapse.usage import ChoicePool, use_of, use_sums
from lar_lightning.errors import SettingError, unknown_name
from lar_lightning.losses.distillation import RowTerms
from lar_lightning.models.embeddings import STARTS_AT_CHANCE
from lar_lightning.module import LatentActionModule

Action = Literal["warn", "restore_best", "lower_rate", "stop"]
ACTIONS = ("warn", "restore_best", "lower_rate", "stop")
STATE = (
    "num_alarms",
    "num_restores",
    "is_stopped",
    "first_step",
    "best",
    "best_step",
    "start",
)
"""What a run that goes on has to know."""


class CollapseDetection(L.Callback):
    """Tests signals of collapse one after the other, at every step and every validation.

    Each alarm is a line, an entry of `run_dir/metrics/collapse.jsonl`, the metric `collapse/alarm`
    (alarms so far), and an alert where a logger has alerts (Weights & Biases). All processes see
    the same values and decide alike. See `lar_lightning.collapse.signals` for what is watched.
    """

    def __init__(
        self,
        actions: tuple[Action, ...] = ("warn",),
        warmup_share: float = 0.1,
        rate_factor: float = 0.3,
        max_restores: int = 3,
        signals: tuple[Signal, ...] = (),
    ) -> None:
        """Set up the tests.

        Args:
            actions: Taken at an alarm, in this order whatever theirs: `warn` (always done),
                `restore_best` (the weights of the best validation, or of the start, with new
                optimizers), `lower_rate`, `stop`. `stop` alone leaves the collapsed weights in the
                last checkpoint; with `restore_best` it leaves the best ones.
            warmup_share: Share of all steps in which only what needs no warm-up is tested.
            rate_factor: What `lower_rate` multiplies the learning rate by.
            max_restores: After so many, one more also stops the run.
            signals: To be watched beside the default ones, or instead of those of the same name.
        """
        for action in actions:
            if action not in ACTIONS:
                raise unknown_name("actions", "be some of", action, ACTIONS)
        if not 0 <= warmup_share < 1:
            raise SettingError(f"`warmup_share` must lie in 0..1 without 1, got {warmup_share}.")
        if not 0 < rate_factor < 1:
            raise SettingError(f"`rate_factor` must lie between 0 and 1, got {rate_factor}.")
        self.actions, self.signals = tuple(actions), tuple(signals)
        self.warmup_share, self.rate_factor = warmup_share, rate_factor
        self.max_restores = max_restores
        self.monitor = Monitor([*DEFAULT_SIGNALS, *signals])
        self.num_alarms = self.num_restores = 0
        self.is_stopped = False
        self.first_step = 0
        """From which warm-up is counted."""
        self.best = float("inf")
        self.best_step: int | None = None
        self.start: list[float] = []
        """Held-out rows and loss before the first step."""
        self.pool = ChoicePool()
        self._gradient_norm: float | None = None
        self._held_out = torch.zeros(8)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.is_stopped and "stop" in self.actions:
            say(trainer, "this run was stopped; to go on, take `stop` out of `actions`")
            trainer.should_stop = True
        if "restore_best" in self.actions and self.best_step is None:
            self._keep(trainer)

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, LatentActionModule)
        rows = list(pl_module.student.rows.parameters())
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in rows if p.grad is not None])
        self._gradient_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: DistillationBatch,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, LatentActionModule)
        names = self.monitor.names("step")
        values = self._logged(trainer, names)
        if pl_module.last_terms is None:  # the last loss that was logged is an earlier step's
            values.pop("train/loss_nats", None)
        values |= step_signals(pl_module, batch, self._gradient_norm, self.pool)
        self._gradient_norm = None
        # The first step's loss is of the untrained rows.
        starts_at_chance = pl_module.hparams["initialization"] in STARTS_AT_CHANCE
        if "collapse/choice" in values and trainer.global_step <= 1 and starts_at_chance:
            values["collapse/misplaced_rows"] = abs(values["collapse/choice"] - 1)
        for name in ("choice", "underuse", "overuse", "adoption", "row_gradient_norm"):
            if (value := values.get(f"collapse/{name}")) is not None:
                pl_module.log(f"collapse/{name}", value)
        self._test(trainer, pl_module, names, values)
        pl_module.log("collapse/alarm", float(self.num_alarms))

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._held_out = torch.zeros(8, device=pl_module.device)

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: DistillationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, LatentActionModule)
        terms: RowTerms = outputs
        sums = use_sums(batch.targets, terms.split, pl_module.student.folding)
        nats = (terms.folded + terms.split).sum()
        self._held_out += torch.stack([nats, nats.new_tensor(len(terms.folded)), *sums])

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, LatentActionModule)
        sums: Any = trainer.strategy.reduce(self._held_out, reduce_op="sum")
        loss, rows = float(sums[0] / sums[1]), float(sums[1])
        if trainer.sanity_checking:
            self.start = [rows, loss]
            return
        names = self.monitor.names("validation")
        values = self._logged(trainer, names)
        use = use_of(sums[2:])
        values |= {f"collapse/val_{k}": v for k, v in vars(use).items() if v is not None}
        values["collapse/val_nats"] = loss
        if self.start[:1] == [rows]:  # of the same text in the same units
            values["collapse/loss_against_start"] = loss / self.start[1]
        is_quiet = not self._test(trainer, pl_module, names, values)
        if "restore_best" in self.actions and is_quiet and loss < self.best:
            self.best = loss
            self._keep(trainer)

    def _logged(self, trainer: L.Trainer, names: list[str]) -> dict[str, float]:
        metrics = trainer.callback_metrics
        return {name: float(metrics[name]) for name in names if name in metrics}

    def _test(
        self,
        trainer: L.Trainer,
        module: LatentActionModule,
        names: list[str],
        values: dict[str, float],
    ) -> list[Alarm]:
        """Test means over processes, and act."""
        values = agreed(trainer, names, values)
        if trainer.global_step <= self._begin(module):
            values = {
                name: value
                for name, value in values.items()
                if not self.monitor.tests[name].signal.has_warmup
            }
        alarms = self.observe(values, trainer.global_step)
        if alarms:
            self.num_alarms += len(alarms)
            announce(trainer, alarms, self.num_alarms, self._act(trainer))
        return alarms

    def observe(self, values: dict[str, float], step: int) -> list[Alarm]:
        """Hand values that all processes agree on to the tests."""
        return self.monitor.observe(values, step)

    def _begin(self, module: LatentActionModule) -> int:
        """Return the last step of warm-up."""
        cycle = module.num_steps / module.num_cycles
        grounding = max(module.distillation.grounding_steps - self.first_step, 0)
        return self.first_step + grounding + round(self.warmup_share * cycle)

    def _act(self, trainer: L.Trainer) -> str:
        """Do what was asked for, and return what that was."""
        done: list[str] = []
        is_last = False
        if "restore_best" in self.actions:
            restore_weights(trainer, self._path(trainer))
            self.monitor.rearm()
            is_last = self.num_restores == self.max_restores
            self.num_restores += 1
            done.append(f"the weights of step {self.best_step} are back")
        if "lower_rate" in self.actions:
            scale_learning_rate(trainer, self.rate_factor)
            done.append(f"the learning rate is multiplied by {self.rate_factor:g}")
        if "stop" in self.actions or is_last:
            self.is_stopped = trainer.should_stop = True
            done.append("training stops")
        return ", ".join(done) or "nothing is done about it"

    def _path(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints" / "best.ckpt"

    def _keep(self, trainer: L.Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        self.best_step = trainer.global_step
        trainer.save_checkpoint(self._path(trainer), weights_only=True)

    def restart(self, step: int) -> None:
        """Begin anew at a step, with warm-up: what is trained has become another."""
        self.monitor.restart()
        self.pool = ChoicePool()
        self.first_step, self.start, self.best = step, [], float("inf")

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        unseen = [s.name for s in self.signals if not self.monitor.tests[s.name].num_values]
        if unseen:
            rank_zero_warn(
                f"`signals` names metrics of which CollapseDetection has seen no value behind its "
                f"warm-up: {', '.join(unseen)}. Check their names against the logs."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor.state_dict(), "pool": dict(vars(self.pool))} | {
            name: getattr(self, name) for name in STATE
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.monitor.load_state_dict(state_dict["monitor"])
        vars(self.pool).update(state_dict.get("pool", {}))
        for name in STATE:
            setattr(self, name, state_dict[name])
