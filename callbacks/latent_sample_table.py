"""What the student writes while it is trained, with its latents marked."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from callbacks.horizon_metrics import HorizonMetrics
from lar_lightning.base_models import load_tokenizer
from lar_lightning.errors import SettingError
from lar_lightning.evaluation.examples import Piece, marked_runs, pieces_of
from lar_lightning.metrics.generations import GeneratedSample, Generation
from lar_lightning.metrics.records import StepRecords, metrics_path, writes_files
from lar_lightning.module import LatentActionModule
from lar_lightning.run_folder import base_checkpoint, vocabulary_path
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tokenizer import decode, extend_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COLUMNS = (
    *("step", "task", "prompt_end", "text", "marked", "units", "tokens"),
    *("units_per_token", "agreement", "finished"),
)


class LatentSampleTable(L.Callback):
    """Keeps the texts that `HorizonMetrics` has the student write.

    Metrics recorded:
        gen/samples: with a `WandbLogger`, a table at each step of writing: task, end of the prompt,
            text with latents highlighted, and with latents in brackets, units, base tokens,
            agreement with the teacher's greedy text.
        gen/samples_page: with a `WandbLogger`, the highlighted texts on one page. W&B keeps the
            pages inside a table apart from an offline run's files until it is synchronised.

    File, without W&B too: `run_dir/metrics/samples.jsonl`, one text a line with its pieces
    (text, `latent`, `explicit` or `special`, units, base tokens).
    """

    def __init__(self, num_samples: int = 8, prompt_characters: int = 160) -> None:
        """Set up the table.

        Args:
            num_samples: Most texts that are kept of each step.
            prompt_characters: Of each prompt's end that are shown.
        """
        for name, value in (
            ("num_samples", num_samples),
            ("prompt_characters", prompt_characters),
        ):
            if value < 1:
                raise SettingError(f"`LatentSampleTable.{name}` must be at least 1, got {value}.")
        self.num_samples = num_samples
        self.prompt_characters = prompt_characters

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LatentActionModule)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        writers = [other for other in callbacks if isinstance(other, HorizonMetrics)]
        if not any(writer.period for writer in writers):
            raise SettingError(
                "`trainer.callbacks` must hold HorizonMetrics with `generate_every_n_steps` above "
                "0 where LatentSampleTable is among them, got none: nothing would be written. Add "
                "it, or leave the table out."
            )
        self.vocabulary = LatentVocabulary.load(vocabulary_path(pl_module.run_dir))
        base = load_tokenizer(base_checkpoint(pl_module.base_model))
        self.tokenizer = extend_tokenizer(base, self.vocabulary)
        self.file = StepRecords(metrics_path(pl_module.run_dir) / "samples.jsonl")

    def on_generation(
        self, trainer: L.Trainer, pl_module: L.LightningModule, generation: Generation
    ) -> None:
        """Keep what was written."""
        if not writes_files(trainer):
            return
        rows = [
            sample_row(self.tokenizer, self.vocabulary, sample, self.prompt_characters)
            for sample in generation.samples[: self.num_samples]
        ]
        self.file.put(generation.step, rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _show(logger, generation.step, rows)


def sample_row(
    tokenizer: "PreTrainedTokenizerFast",
    vocabulary: LatentVocabulary,
    sample: GeneratedSample,
    prompt_characters: int,
) -> dict[str, Any]:
    """Return what is kept of a text.

    Args:
        tokenizer: Knows the latents.
        vocabulary: Of the units.
        sample: What was written.
        prompt_characters: Of its prompt's end that are kept.
    """
    pieces = pieces_of(tokenizer, vocabulary, sample.units)
    return {
        "task": sample.prompt.task_id,
        "trajectory": sample.prompt.trajectory_id,
        "prompt_end": decode(tokenizer, sample.prompt.units)[-prompt_characters:],
        "text": "".join(piece.text for piece in pieces),
        "pieces": [[p.text, p.kind, p.num_units, p.num_tokens] for p in pieces],
        "units": len(sample.units),
        "tokens": len(sample.tokens),
        "agreement": sample.agreement,
        "finished": sample.is_finished,
    }


def _show(logger: WandbLogger, step: int, rows: Sequence[dict[str, Any]]) -> None:
    import wandb

    table, pages = [], []
    for row in rows:
        pieces = [
            Piece(text=text, kind=kind, num_units=units, num_tokens=tokens)
            for text, kind, units, tokens in row["pieces"]
        ]
        page = highlighted(pieces)
        values = {
            **row,
            "step": step,
            "text": wandb.Html(page, inject=False),
            "marked": bracketed(pieces),
            "units_per_token": row["units"] / max(row["tokens"], 1),
        }
        table.append([values[column] for column in COLUMNS])
        pages.append(f"<h4>{html.escape(row['task'])}</h4>{page}")
    logger.log_table("gen/samples", list(COLUMNS), table, step=step)
    whole: Any = wandb.Html("<hr>".join(pages), inject=False)
    logger.log_metrics({"gen/samples_page": whole}, step=step)


def bracketed(pieces: Sequence[Piece]) -> str:
    """Return pieces as text in which latents stand in brackets, and nothing is hidden."""
    shown = ["".join(text for text, _ in marked_runs(piece.text, "hidden")) for piece in pieces]
    return "".join(
        f"\u27e6{text}\u27e7" if piece.kind == "latent" else text
        for piece, text in zip(pieces, shown, strict=True)
    )


STYLES = {"latent": "background:#cfe8cf;border-radius:3px", "special": "color:#999"}
MARK_STYLE = "color:#b00"


def highlighted(pieces: Sequence[Piece]) -> str:
    """Return pieces as HTML in which nothing of the text is markup, and latents stand out."""
    parts = []
    for piece in pieces:
        shown = "".join(
            f'<span style="{MARK_STYLE}">{html.escape(text)}</span>'
            if is_mark
            else html.escape(text)
            for text, is_mark in marked_runs(piece.text, "hidden")
        )
        style = STYLES.get(piece.kind)
        title = f"{piece.num_units} unit, {piece.num_tokens} tokens"
        opened = f'<span style="{style}" title="{title}">' if style else ""
        parts.append(f"{opened}{shown}{'</span>' if style else ''}")
    page = "font-family:monospace;white-space:pre-wrap"
    return f'<meta charset="utf-8"><div style="{page}">{"".join(parts)}</div>'
