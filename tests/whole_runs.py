"""Whole runs of a tiny model through the command line, and what they leave behind."""

from pathlib import Path

import pytest
import torch
from tiny_run import ROLLOUT_OPTIONS

from lar_lightning.__main__ import main
from lar_lightning.module import LatentActionModule

TEN_STEPS = ("--trainer.max_steps=10", "--trainer.max_epochs=-1", "--model.learning_rate=1.0")
MINING = ["--data.init_args.mining.max_latents=12", "--data.init_args.mining.min_support=3"]
COMMON = [
    *MINING,
    "--data.init_args.loading.batch_size=16",
    "--model.trainable=rows",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.enable_progress_bar=false",
]
SMALL = [*ROLLOUT_OPTIONS, *COMMON]


def fit_arguments(run_dir: Path, checkpoint: Path, *options: str) -> list[str]:
    own = [
        "--config",
        "configs/quickstart.yaml",
        f"--base_model={checkpoint}",
        f"--run_dir={run_dir}",
    ]
    return ["fit", *own, *SMALL, *options]


def checkpoint_of(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def metrics_of(run_dir: Path, name: str) -> list[float]:
    import csv

    rows: list[tuple[int, float]] = []
    for file in sorted((run_dir / "logs").glob("version_*/metrics.csv")):
        with file.open() as lines:
            rows += [
                (int(row["step"]), float(row[name]))
                for row in csv.DictReader(lines)
                if row.get(name)
            ]
    return [value for _, value in sorted(rows)]


def fit_until(num_steps: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit, and press Ctrl-C when so many steps are done; Lightning ends the process then."""
    step = LatentActionModule.training_step

    def stopping(self: LatentActionModule, batch: object, batch_idx: int) -> torch.Tensor:
        if self.global_step == num_steps:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(LatentActionModule, "training_step", stopping)
        with pytest.raises(SystemExit):
            raise SystemExit(main(arguments))
