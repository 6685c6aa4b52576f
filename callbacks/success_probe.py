"""Whether the student still solves tasks, while it is trained."""

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from callbacks.periodic import Periodic
from lar_lightning.base_models import load_tokenizer
from lar_lightning.benchmarks import Task, load_benchmark
from lar_lightning.errors import SettingError
from lar_lightning.metrics.probe import StudentPolicy, probe
from lar_lightning.metrics.records import record
from lar_lightning.module import LatentActionModule
from lar_lightning.rollouts.roll_out import split_benchmark
from lar_lightning.run_folder import base_checkpoint, vocabulary_path
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tokenizer import extend_tokenizer


class SuccessProbe(Periodic):
    """Has the student play a few held-out tasks of the run's benchmark, with its official scorer.

    Greedy, in the style and with the length of the rollouts, before training, every `every_n_steps`
    steps and after the last. Metrics recorded:
        gen/success_rate: tasks solved; what CollapseDetection watches and AbstractionSchedule can
            ask for (`min_score`).
        gen/failed_share: episodes that could not be played to their end, and so are not solved.
        gen/probe_seconds: that training waited.
    """

    def __init__(
        self, every_n_steps: int = 200, num_tasks: int = 16, num_concurrent: int = 16
    ) -> None:
        """Set up the callback.

        Args:
            every_n_steps: Steps between probes.
            num_tasks: Held-out tasks, spread evenly; shared among processes.
            num_concurrent: Tasks that decode together, in each process.
        """
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("num_tasks", num_tasks),
            ("num_concurrent", num_concurrent),
        ):
            if value < 1:
                raise SettingError(f"`SuccessProbe.{name}` must be at least 1, got {value}.")
        super().__init__(every_n_steps)
        self.num_tasks, self.num_concurrent = num_tasks, num_concurrent
        self.tasks: list[Task] = []

    def check_run(
        self, trainer: L.Trainer, pl_module: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Refuse data that cannot be played; `fit` asks before any work.

        Raises:
            SettingError: if there is no benchmark.
        """
        if not hasattr(data, "benchmark"):
            raise SettingError(
                "`SuccessProbe` must have a benchmark to play, got data of "
                f"{type(data).__name__}: recordings can be read, not played. Take the callback "
                "out, or use `data_modules.RolloutDataModule`."
            )

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.check_run(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LatentActionModule)
        if pl_module.student.is_sharded:
            rank_zero_warn(
                "SuccessProbe: nothing is played in training: the model is sharded, and its "
                "processes would write texts of other lengths."
            )
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.benchmark = load_benchmark(data.benchmark)
        self.settings = data.rollouts
        _, held_out = split_benchmark(data.benchmark, self.settings)
        places = np.linspace(0, len(held_out) - 1, min(self.num_tasks, len(held_out)))
        self.tasks = [held_out[place] for place in places.round().astype(int)]
        self.mined = LatentVocabulary.load(vocabulary_path(pl_module.run_dir))
        self.base_tokenizer = load_tokenizer(base_checkpoint(pl_module.base_model))
        self._follow(pl_module)

    def _follow(self, pl_module: LatentActionModule) -> None:
        """Speak the latents in play, which AbstractionSchedule changes."""
        number = pl_module.student.num_active
        if not hasattr(self, "vocabulary") or len(self.vocabulary) != number:
            self.vocabulary = self.mined.first(number)
            self.tokenizer = extend_tokenizer(self.base_tokenizer, self.vocabulary)

    @override
    def act(self, trainer: L.Trainer, pl_module: LatentActionModule) -> None:
        """Play the tasks and record how many are solved."""
        if not self.tasks or getattr(trainer, "fast_dev_run", False):
            return
        self._follow(pl_module)
        student = pl_module.student
        with trainer.precision_plugin.forward_context():
            own = probe(
                StudentPolicy(student, self.tokenizer, self.num_concurrent),
                self.benchmark,
                self.settings.style,
                self.tasks[trainer.global_rank :: trainer.world_size],
                self.vocabulary,
                max_tokens=self.settings.max_tokens,
                max_model_len=self.settings.max_model_len,
            )
        sums: Any = trainer.strategy.reduce(
            torch.tensor([own.num_tasks, own.num_solved, own.num_failed], device=pl_module.device),
            reduce_op="sum",
        )
        num_tasks, num_solved, num_failed = sums.tolist()
        values = {
            "gen/success_rate": num_solved / num_tasks,
            "gen/failed_share": num_failed / num_tasks,
            "gen/probe_seconds": own.seconds,
        }
        record(trainer, values)
