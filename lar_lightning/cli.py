"""Lightning's verbs with the run's own keys: `base_model`, `benchmark`, `run_dir` and `evaluation` stand at the top."""

from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from typing_extensions import override

from lar_lightning.module import LatentActionModule
from lar_lightning.runs import checkpoint_path
from lar_lightning.settings import EvaluationSettings


class RunCLI(LightningCLI):
    """LightningCLI over a run folder, which training resumes from by itself."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--base_model", type=str, required=True, help="folder, hub id or pypi:<distribution>")
        parser.add_argument("--benchmark", type=str, default="humaneval", help="benchmark whose tasks are rolled out")
        parser.add_argument("--run_dir", type=Path, required=True, help="folder of the run")
        parser.add_argument("--evaluation", type=EvaluationSettings, default=EvaluationSettings(), help="for `evaluate`")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        # The file that a killed run goes on from; kept by name so that export and report find it.
        parser.set_defaults(
            {
                "checkpoint.filename": "last",
                "checkpoint.enable_version_counter": False,
                "checkpoint.every_n_train_steps": 10,
                "checkpoint.save_on_train_epoch_end": True,
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
        config: Namespace = self.config[self.subcommand] if self.subcommand else self.config
        last = checkpoint_path(Path(config.run_dir))
        if config.get("ckpt_path") is None and last.exists() and self.subcommand is not None:
            print(f"{self.subcommand}: goes on from {last}", flush=True)
            config.ckpt_path = str(last)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config: Namespace = self.config[self.subcommand] if self.subcommand else self.config
        if config.trainer.logger is None:
            kwargs.setdefault("logger", CSVLogger(config.run_dir, name="logs", flush_logs_every_n_steps=10))
        return super().instantiate_trainer(**kwargs)

    @override
    def _parse_ckpt_path(self) -> None:
        """Keep the command line: Lightning would let a checkpoint's settings override it without a word."""


def _checkpoint_folder(run_dir: Path) -> str:
    return str(Path(run_dir) / "checkpoints")


def run_trainer_verb(arguments: list[str]) -> RunCLI:
    """Run `fit`, `validate`, `test` or `predict`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return RunCLI(
        LatentActionModule,
        L.LightningDataModule,
        subclass_mode_data=True,
        args=arguments,
        # Lightning prefers a progress bar that is silent where output goes to a file, as it does on a cluster.
        trainer_defaults={"use_distributed_sampler": False, "callbacks": [TQDMProgressBar()]},
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},
    )
