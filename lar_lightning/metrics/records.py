"""Where figures go: to the trainer's loggers, and to files of their own in the run folder.

run_dir/metrics/latent_usage.csv     how often each latent is due and taken, at last
run_dir/metrics/latent_usage.jsonl   the same at every step where it was measured
run_dir/metrics/samples.jsonl        what the student wrote
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lar_lightning.artefacts import write_text
from lar_lightning.segments import LatentVocabulary

if TYPE_CHECKING:
    import lightning as L

Source = Literal["held_out", "generated"]


def metrics_path(run_dir: Path) -> Path:
    """Return where a run keeps what is no scalar."""
    return run_dir / "metrics"


def record(trainer: "L.Trainer", values: Mapping[str, float]) -> None:
    """Give figures to all loggers at once, whatever step they log at, and to other callbacks.

    `log` would hold them back until the next step that is logged, and repeat them at each.
    """
    import torch

    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)
    trainer.callback_metrics.update(
        {name: torch.tensor(float(value)) for name, value in values.items()}
    )


def record_histogram(trainer: "L.Trainer", key: str, counts: Sequence[float]) -> None:
    """Give counts by latent to W&B, where it listens; it takes 512 bars at most."""
    import numpy as np
    from lightning.pytorch.loggers import WandbLogger

    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and len(counts):
            import wandb

            bars = np.histogram(np.arange(len(counts)), min(len(counts), 512), weights=counts)
            drawn: Any = wandb.Histogram(np_histogram=bars)
            logger.log_metrics({key: drawn}, step=trainer.global_step)


def writes_files(trainer: "L.Trainer") -> bool:
    """Tell whether this process keeps files of a training run; a dry run leaves none."""
    is_dry = bool(getattr(trainer, "fast_dev_run", False))
    return trainer.is_global_zero and trainer.state.fn == "fit" and not is_dry


class StepRecords:
    """A file of one JSON object a line, each with the `step` that it belongs to.

    Written whole or not at all. A run that goes on from an earlier step, or begins anew, replaces
    what was written at that step and forgets what came after it.
    """

    def __init__(self, path: Path) -> None:
        """Name the file; it is made with the first records."""
        self.path = path

    def put(self, step: int, records: Sequence[Mapping[str, Any]], source: str = "") -> None:
        """Add the records of a step, of one of several sources where there are more."""
        kept = [
            old
            for old in self.read()
            if old["step"] < step or (old["step"] == step and old["source"] != source)
        ]
        added = [{"step": step, "source": source, **record} for record in records]
        # Escaped to ASCII: what a model wrote cannot steer the terminal that shows it.
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in [*kept, *added]))

    def read(self) -> list[dict[str, Any]]:
        """Return all records, in the order of steps; a line that is none is left out."""
        records = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with suppress(ValueError):  # somebody's edit must not end the training
                records.append(json.loads(line))
        return records


class UsageFiles:
    """How often each latent is due and taken, on held-out text and in what the student writes."""

    def __init__(self, run_dir: Path, vocabulary: LatentVocabulary) -> None:
        """Name the files."""
        self.vocabulary = vocabulary
        self.history = StepRecords(metrics_path(run_dir) / "latent_usage.jsonl")
        self.table = metrics_path(run_dir) / "latent_usage.csv"

    def add(self, step: int, source: Source, histograms: Mapping[str, Sequence[float]]) -> None:
        """Add what was counted at a step, and write the table anew.

        Args:
            step: Steps that training had done.
            source: What they were counted in.
            histograms: Counts by name, `due` and `taken`, for each latent.
        """
        counts = {name: [round(v, 4) for v in values] for name, values in histograms.items()}
        self.history.put(step, [counts], source)
        last = {
            record["source"]: record
            for record in self.history.read()
            if len(record["due"]) == len(self.vocabulary)  # of this vocabulary
        }
        columns = {
            f"{source}_{name}": record[name]
            for source, record in sorted(last.items(), reverse=True)
            for name in ("due", "taken")
        }
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["latent", "text", "num_tokens", *columns])
        for index, latent in enumerate(self.vocabulary.latents):
            # As a JSON string: one line, in which nothing steers what shows it.
            head = [index, json.dumps(latent.text), len(latent.segment)]
            writer.writerow([*head, *(values[index] for values in columns.values())])
        write_text(self.table, buffer.getvalue())
