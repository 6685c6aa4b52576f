"""Lightning's verbs with the run's own keys.

`base_model`, `benchmark`, `run_dir` and `evaluation` stand at the top.
"""

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lar_lightning.distributed.strategy import RunCheckpointIO
from lar_lightning.errors import SettingError
from lar_lightning.module import LatentActionModule
from lar_lightning.recovery.checkpoints import LAST, newest_whole
from lar_lightning.recovery.requeue import release_signals
from lar_lightning.recovery.run_lock import is_first_process, locked
from lar_lightning.run_folder import checkpoint_path
from lar_lightning.settings import EvaluationSettings
from lar_lightning.training.progress import progress_bar

DATA_OPTION = "--data."


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
            self._save_checkpoint(trainer, str(Path(str(self.dirpath)) / LAST))

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        # Lightning raises it between two steps, on all ranks at once.
        is_between = isinstance(exception, SIGTERMException) and trainer.training
        if is_between and trainer.global_step != self._last_global_step_saved:
            self._save_checkpoint(trainer, str(Path(str(self.dirpath)) / LAST))


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
        parser.link_arguments("run_dir", "trainer.logger.init_args.save_dir")
        parser.link_arguments("run_dir", "checkpoint.dirpath", compute_fn=_checkpoint_folder)
        # for callbacks that have it; others are passed over
        parser.link_arguments("run_dir", "trainer.callbacks.init_args.run_dir")

    @override
    def before_instantiate_classes(self) -> None:
        config: Namespace = self._of_subcommand(self.config)
        last = checkpoint_path(Path(config.run_dir))
        whole = newest_whole(last) if config.get("ckpt_path") is None else None
        if whole is not None and self.subcommand is not None:
            torn = "" if whole == last else f", since {last.name} is torn or missing"
            print(f"{self.subcommand}: goes on from {whole}{torn}", flush=True)
            config.ckpt_path = str(whole)
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
        release_signals()  # who listens is there

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config: Namespace = self._of_subcommand(self.config)
        kwargs.setdefault("logger", self._loggers(config.run_dir))
        if config.trainer.enable_progress_bar is not False:
            # Lightning prefers a bar that is silent where output goes to a file, as on a cluster.
            callbacks = self._of_subcommand(self.config_init).trainer.callbacks or []
            if not any(isinstance(callback, ProgressBar) for callback in callbacks):
                kwargs.setdefault("callbacks", [*callbacks, progress_bar()])
        plugins = self._of_subcommand(self.config_init).trainer.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        is_given = any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)
        if SLURMEnvironment.detect() and not is_given:
            # Lightning would save a file of its own inside a signal's handler, and hang.
            plugins = [*plugins, SLURMEnvironment(auto_requeue=False)]
        kwargs.setdefault("plugins", [*plugins, RunCheckpointIO()])
        return super().instantiate_trainer(**kwargs)

    def fit(self, **options: Any) -> None:
        """Train, with no other `fit` in the run folder."""
        run_dir = Path(self._of_subcommand(self.config).run_dir)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "check_run"):  # of ours: before rollouts and mining
                callback.check_run(self.trainer, options["model"], options["datamodule"])
        with locked(run_dir) if is_first_process() else nullcontext():
            try:
                self.trainer.fit(**options)
            except SIGTERMException as error:
                # Lightning would end with 0, which tells a scheduler that training is finished.
                print("stopped by SIGTERM: the same command goes on from here", file=sys.stderr)
                raise SystemExit(128 + signal.SIGTERM) from error

    def _loggers(self, run_dir: Path) -> list[Logger] | bool:
        """Put the CSV log before all others: what they are told is in the run's folder too."""
        given = self._of_subcommand(self.config_init).trainer.logger
        if given is False:
            return False
        others = [given] if isinstance(given, Logger) else given
        others = list(others) if isinstance(others, Iterable) else []
        csv = CSVLogger(run_dir, name="logs", flush_logs_every_n_steps=1)
        if any(isinstance(o, CSVLogger) and Path(o.root_dir) == Path(csv.root_dir) for o in others):
            return others
        return [csv, *others]

    def _of_subcommand(self, config: Any) -> Any:
        return config[self.subcommand] if self.subcommand else config

    @override
    def _parse_ckpt_path(self) -> None:
        """Keep the command line.

        Lightning would let a checkpoint's settings override it without a word.
        """


def _checkpoint_folder(run_dir: Path) -> str:
    return str(Path(run_dir) / "checkpoints")


def run_trainer_verb(arguments: list[str]) -> RunCLI:
    """Run `fit`, `validate`, `test` or `predict`.

    Raises:
        KeyboardInterrupt: if Ctrl-C came, which Lightning ends with without a word.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    silence_known_noise()
    try:
        return RunCLI(
            LatentActionModule,
            L.LightningDataModule,
            subclass_mode_data=True,
            args=to_the_letter(arguments),
            trainer_defaults={"use_distributed_sampler": False},
            save_config_kwargs={"overwrite": True},
        )
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


def to_the_letter(arguments: list[str]) -> list[str]:
    """Write lists of texts among the data's options as a configuration, which comes through whole.

    As an option of `init_args` jsonargparse writes a list out as Python does and reads it as YAML:
    backslashes of a regular expression are doubled, and some quotes end in an error.
    """
    whole: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        name, equals, value = argument.partition("=")
        if not name.startswith(DATA_OPTION):
            whole.append(argument)
            continue
        given = [argument] if equals else [argument, *islice(pending, 1)]
        texts = _texts(value if equals else given[-1])
        if texts is None:
            whole += given
            continue
        nested: Any = texts
        keys = name.removeprefix(DATA_OPTION).removeprefix("init_args.").split(".")
        for key in reversed(["data", "init_args", *keys]):
            nested = {key: nested}
        whole.append(f"--config={json.dumps(nested)}")
    return whole


def _texts(value: str) -> list[Any] | None:
    """Return the list that a value is, where it holds text."""
    if not value.lstrip().startswith("["):
        return None
    try:
        items = yaml.safe_load(value)
    except yaml.YAMLError:
        return None  # the parser says what is wrong with it
    return items if any(isinstance(item, str) for item in items) else None


def silence_known_noise() -> None:
    """Hide what Lightning says of itself and a user can do nothing about."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*module.s. in eval mode at the start of training.*",  # the student stays there on purpose
        ".*does not have many workers.*",
        "LightningCLI's args parameter is intended to run from within Python.*",
        ".*Checkpoint directory .* exists and is not empty.*",  # a run folder is resumed
        ".*Experiment logs directory .* exists.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    if "SLURM_JOB_ID" not in os.environ:  # elsewhere it helps
        warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "litlogger" not in record.getMessage())
