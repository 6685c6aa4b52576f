"""What the folder of a run holds, as the page about it reads it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lar_lightning.agents.episode import Episode
from lar_lightning.errors import SettingError
from lar_lightning.evaluation.plots import Curves, read_curves
from lar_lightning.evaluation.run_records import (
    Alarm,
    Sample,
    Stage,
    read_alarms,
    read_config,
    read_samples,
    read_stages,
    read_usage,
)
from lar_lightning.evaluation.runner import read_header, read_run
from lar_lightning.evaluation.vocabulary_browser import Use, mined_uses
from lar_lightning.run_folder import export_path, vocabulary_path
from lar_lightning.segments import LatentVocabulary

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunContents:
    """What the folder of a run holds; None or empty where a stage has not been."""

    rows: list[Row]
    vocabulary: LatentVocabulary | None
    curves: Curves
    episodes: dict[str, dict[str, Episode]]
    """First run of vanilla and of LAR: method -> task -> episode."""
    settings: Mapping[str, Any]
    """Of the evaluation."""
    export: Path | None
    """The trained checkpoint, whose tokenizer knows the latents."""
    alarms: list[Alarm]
    stages: list[Stage]
    samples: list[Sample]
    usage: dict[int, dict[str, float]]
    mined_uses: dict[int, Use]
    config: str


def read_contents(run_dir: Path) -> RunContents:
    """Read what is there.

    Raises:
        SettingError: if a file is not what its stage writes.
    """
    results, export = run_dir / "results.json", export_path(run_dir)
    served = vocabulary_path(export)  # of a run in stages, the latents that held
    path = served if served.exists() else vocabulary_path(run_dir)
    evaluated = {
        method: run_dir / "evaluation" / f"{method}-0.jsonl" for method in ("vanilla", "lar")
    }
    headers = {method: read_header(file) for method, file in evaluated.items() if file.exists()}
    try:
        episodes = {
            method: {
                episode.task_id: episode
                for episode in read_run(evaluated[method], method, 0).episodes
            }
            for method in headers
        }
        settings = headers["lar"]["signature"]["settings"] if "lar" in headers else {}
    except (KeyError, TypeError) as error:
        raise SettingError(
            f"`run_dir` must hold answers of this version in {run_dir / 'evaluation'}, got others "
            f"({error!r}). Remove them and run the verb `evaluate`."
        ) from error
    vocabulary = LatentVocabulary.load(path) if path.exists() else None
    mined = run_dir / "mining_report.json"
    return RunContents(
        rows=_read_json(results) if results.exists() else [],
        vocabulary=vocabulary,
        curves=read_curves(run_dir / "logs"),
        episodes=episodes,
        settings=settings,
        export=export if (export / "tokenizer.json").exists() else None,
        alarms=read_alarms(run_dir),
        stages=read_stages(run_dir),
        samples=read_samples(run_dir),
        usage=read_usage(run_dir),
        mined_uses=mined_uses(mined, vocabulary) if vocabulary else {},
        config=read_config(run_dir),
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SettingError(
            f"`run_dir` must hold JSON in {path}, got something else ({error}). "
            "Remove it and run the verb `evaluate`."
        ) from error
