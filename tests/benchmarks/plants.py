"""Collapses made on purpose, and a detection that writes down what it sees."""

import csv
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from typing_extensions import override

from callbacks import CollapseDetection
from lar_lightning.base_models import load_tokenizer
from lar_lightning.collapse import Alarm
from lar_lightning.collapse.actions import scale_learning_rate
from lar_lightning.run_folder import vocabulary_path
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.tokenizer import decode
from lar_lightning.trajectories import ACTION, Trajectory

Kind = Literal["none", "rate", "entropy", "shuffled", "frozen"]
FORCED_ENTROPY = 99.0
"""Nats noted for segments that are forced in: so they stand behind all others."""


class Plant(L.Callback):
    """Breaks a run at a step.

    `rate`: learning rate times 100. `entropy`: segments that are forced into the vocabulary come
    into play. `shuffled`: latents swap their rows. `frozen`: random rows that are not trained.
    """

    def __init__(self, kind: Kind = "none", at_step: int = 0) -> None:
        self.kind, self.at_step = kind, at_step
        self.is_done = kind == "none"

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        vocabulary = LatentVocabulary.load(vocabulary_path(Path(trainer.default_root_dir)))
        mined = [z for z in vocabulary.latents if z.inner_entropy != FORCED_ENTROPY]
        self._activate(trainer, pl_module, len(mined))

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_done or trainer.global_step < self.at_step:
            return
        self.is_done = True
        rows = pl_module.student.rows
        if self.kind == "rate":
            scale_learning_rate(trainer, 100.0)
        elif self.kind == "entropy":
            self._activate(trainer, pl_module, len(rows.input_rows))
        for matrix in (rows.input_rows, rows.output_rows):
            if self.kind == "shuffled":
                number = pl_module.student.num_active
                matrix.data[:number] = matrix.data[:number].roll(1, 0)
            elif self.kind == "frozen":
                noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0))
                norm = matrix.data.norm(dim=1, keepdim=True)
                matrix.data.copy_(noise * norm / noise.norm(dim=1, keepdim=True))
                matrix.requires_grad_(False)

    def _activate(self, trainer: Any, module: Any, number: int) -> None:
        module.activate(number)
        trainer.datamodule.activate(number)


class RecordingDetection(CollapseDetection):
    """Writes what it tests to `run_dir/collapse_series.csv`, with four digits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.series: list[dict[str, str]] = []

    @override
    def observe(self, values: dict[str, float], step: int) -> list[Alarm]:
        self.series.append({"step": str(step), **{k: f"{v:.4g}" for k, v in values.items()}})
        return super().observe(values, step)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = dict.fromkeys(name for row in self.series for name in row)
        with (Path(trainer.default_root_dir) / "collapse_series.csv").open("w") as file:
            table = csv.DictWriter(file, list(names), lineterminator="\n")
            table.writeheader()
            table.writerows(self.series)


def force_segments(
    run_dir: Path, checkpoint: Path, trajectories: list[Trajectory], num_segments: int = 60
) -> None:
    """Put random pieces of actions behind the mined latents: what follows is anyone's guess."""
    vocabulary = LatentVocabulary.load(vocabulary_path(run_dir))
    tokenizer = load_tokenizer(checkpoint)
    random = np.random.default_rng(0)
    special = set(tokenizer.all_special_ids)
    known = set(vocabulary.segments)
    texts = {latent.text for latent in vocabulary.latents}
    forced: list[LatentAction] = []
    while len(forced) < num_segments:
        trajectory = trajectories[random.integers(len(trajectories))]
        span = next(span for span in trajectory.spans if span.role == ACTION)
        start = int(random.integers(span.start, max(span.end - 3, span.start + 1)))
        segment = tuple(trajectory.token_ids[start : min(start + 3, span.end)].tolist())
        text = decode(tokenizer, segment)
        if len(segment) < 3 or segment in known or text in texts or special & set(segment):
            continue
        known.add(segment)
        texts.add(text)
        forced.append(LatentAction(segment=segment, text=text, inner_entropy=FORCED_ENTROPY))
    LatentVocabulary(
        [*vocabulary.latents, *forced],
        base_size=vocabulary.base_size,
        tokenizer_fingerprint=vocabulary.tokenizer_fingerprint,
        provenance=vocabulary.provenance,
    ).save(vocabulary_path(run_dir))
