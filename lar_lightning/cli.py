"""Lightning's verbs with the run's own keys.

`base_model`, `benchmark`, `run_dir` and `evaluation` stand at the top.
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from typing_extensions import override

from lar_lightning.errors import SettingError
from lar_lightning.module import LatentActionModule
from lar_lightning.runs import checkpoint_path
from lar_lightning.settings import EvaluationSettings


class RunCheckpoint(ModelCheckpoint):
    """The file that a killed run goes on from, also written after the very last step."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        is_dry = bool(getattr(trainer, "fast_dev_run", False))
        # One that a callback ends is finished only now, also where the step was saved already.
        is_new = trainer.global_step != self._last_global_step_saved or trainer.should_stop
        if is_new and not is_dry:
            trainer.save_checkpoint(Path(str(self.dirpath)) / "last.ckpt")


class RunCLI(LightningCLI):
    """LightningCLI over a run folder, which training resumes from by itself."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--base_model", type=str, required=True, help="folder, hub id or pypi:<distribution>"
        )
        parser.add_argument(
            "--benchmark",
            type=str,
            default="humaneval",
            help="benchmark whose tasks are rolled out",
        )
        parser.add_argument("--run_dir", type=Path, required=True, help="folder of the run")
        parser.add_argument(
            "--evaluation",
            type=EvaluationSettings,
            default=EvaluationSettings(),
            help="for `evaluate`",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        # The file that a killed run goes on from; kept by name so that export and report find it.
        parser.set_defaults(
            {
                "checkpoint.filename": "last",
                "checkpoint.enable_version_counter": False,
                "checkpoint.every_n_train_steps": 5,
            }
        )
        for name in ("base_model", "run_dir"):
            parser.link_arguments(name, f"model.{name}")
            parser.link_arguments(name, f"data.init_args.{name}")
        parser.link_arguments("benchmark", "data.init_args.benchmark")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("run_dir", "checkpoint.dirpath", compute_fn=_checkpoint_folder)

    @override
    def before_instantiate_classes(self) -> None:
        config: Namespace = self._of_subcommand(self.config)
        last = checkpoint_path(Path(config.run_dir))
        if config.get("ckpt_path") is None and last.exists() and self.subcommand is not None:
            print(f"{self.subcommand}: goes on from {last}", flush=True)
            config.ckpt_path = str(last)
            config.trainer.num_sanity_val_steps = 0  # passed when the run began
        if "weights_only" in config:
            config.weights_only = True  # a checkpoint is data; nothing in it may run

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what a settings class raises in what it tried besides.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, SettingError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config: Namespace = self._of_subcommand(self.config)
        if config.trainer.logger is None:
            kwargs.setdefault(
                "logger", CSVLogger(config.run_dir, name="logs", flush_logs_every_n_steps=10)
            )
        if config.trainer.enable_progress_bar is not False:
            # Lightning prefers a bar that is silent where output goes to a file, as on a cluster.
            callbacks = self._of_subcommand(self.config_init).trainer.callbacks or []
            kwargs.setdefault("callbacks", [*callbacks, TQDMProgressBar()])
        return super().instantiate_trainer(**kwargs)

    def _of_subcommand(self, config: Any) -> Any:
        return config[self.subcommand] if self.subcommand else config

    @override
    def _parse_ckpt_path(self) -> None:
        """Keep the command line.

        Lightning would let a checkpoint's settings override it without a word.
        """


def _checkpoint_folder(run_dir: Path) -> str:
    return str(Path(run_dir) / "checkpoints")


def run_trainer_verb(arguments: list[str] | None) -> RunCLI:
    """Run `fit`, `validate`, `test` or `predict`; None takes the command line."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    silence_known_noise()
    return RunCLI(
        LatentActionModule,
        L.LightningDataModule,
        subclass_mode_data=True,
        args=arguments,
        trainer_defaults={"use_distributed_sampler": False},
        save_config_kwargs={"overwrite": True},
    )


def silence_known_noise() -> None:
    """Hide what Lightning says of itself and a user can do nothing about."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*module.s. in eval mode at the start of training.*",  # the student stays there on purpose
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",  # a run folder is resumed
        ".*Experiment logs directory .* exists.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "litlogger" not in record.getMessage())
