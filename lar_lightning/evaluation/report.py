"""The page about a run: one HTML file that needs nothing else, from what the stages left on disk.

Parts whose files are missing are left out, with the verb that makes them. Texts are model-written:
the template escapes all of them, and on top of that allows no script but its own, by its hash.
"""

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from lar_lightning.agents.episode import Episode
from lar_lightning.artefacts import write_text
from lar_lightning.base_models import load_tokenizer
from lar_lightning.errors import SettingError
from lar_lightning.evaluation.examples import Example, make_examples, marked_runs, pieces_of
from lar_lightning.evaluation.pages import digest, fill, source
from lar_lightning.evaluation.plots import Curves, training_plots
from lar_lightning.evaluation.results.statistics import shared_prefix_share
from lar_lightning.evaluation.run_contents import Row, RunContents, read_contents
from lar_lightning.evaluation.run_plots import boundary_plot, small_plots
from lar_lightning.evaluation.run_records import USAGE, versions
from lar_lightning.evaluation.vocabulary_browser import (
    BrowsedLatent,
    browsed_latents,
    count_latents,
    written_uses,
)

Facts = list[tuple[str, str, str]]
"""Name, value, and what it means."""

REPORT_FILE = "report.html"
NOTHING = "\u2013"
SCRIPT = "page.js"
RESULT_COLUMNS = {
    "score": (
        "Score",
        "share of tasks solved, mean over runs; 95 % interval over tasks; McNemar's exact p",
    ),
    "generated_units": ("Generated units", "steps of decoding; below, against vanilla"),
    "expanded_tokens": ("Expanded tokens", "base tokens of the text that those units stand for"),
    "units_per_expanded_token": (
        "Units per token",
        "1 without latents; what is below, they save",
    ),
    "latents_emitted": ("Latents emitted", "latent actions among the generated units"),
    "adoption_rate": ("Adoption", "latents emitted, of the places for them in the same text"),
    "prompt_tokens": ("Prompt units", "what was read before the answers"),
    "finished_share": ("Finished", "answers that ended before the token limit"),
    "wall_clock_seconds": ("Seconds", "wall clock of all tasks; mean and range of runs"),
    "expanded_tokens_per_second": ("Expanded tokens/s", "text per second; mean and range of runs"),
    "agreement": ("Agreement", "share of the text before it parts from vanilla's"),
}
"""Key in the results -> name and meaning."""
SPREADS = {
    "score": "score_interval_95",
    "wall_clock_seconds": "wall_clock_seconds_range",
    "expanded_tokens_per_second": "expanded_tokens_per_second_range",
}

MINING_FACTS = {
    "num_tokens": ("Action tokens mined", "what was written in the trajectories"),
    "num_tasks": ("Tasks", "support counts these"),
    "saved_held_out": ("Saved, held out", "share of generated tokens, were all latents used"),
    "prompt_saved_held_out": ("Saved in prompts, held out", "share of prompt tokens"),
    "num_refused": ("Refused", "segments whose text does not survive the tokenizer"),
    "different_share": (
        "Units that differ",
        "between the extended tokenizer and the ids, over held-out texts",
    ),
    "entropy_kind": ("Entropy", "how the base model's uncertainty was found"),
}
HELD_OUT_FACTS = {
    "val/loss_against_start": ("Loss against its start", "below 1: nearer to the base model"),
    "val/row_agreement": ("Rows that agree", "likeliest token is the base model's"),
    "val/expected_adoption": ("Expected adoption", "probability of the latent, where it is due"),
    "val/reparameterization_rate": ("Inside latents", "share of action tokens, were all used"),
    "val/units_per_token": ("Units per token", "were all latents used"),
}
FILES = {
    "trajectories": "what the base model wrote on the tasks (rollout)",
    "latent_vocabulary.json": "the latent actions (mine)",
    "mining_report.html": "the page about them (mine)",
    "mining_report.json": "the same for programs (mine)",
    "checkpoints": "what training learned (fit)",
    "logs": "curves and configuration of training (fit)",
    "metrics": "alarms, stages, use of latents and texts of the student (callbacks of fit)",
    "export": "the trained model as an ordinary checkpoint, for any engine (export)",
    "evaluation": "every answer to the held-out tasks (evaluate)",
    "results.json": "the table above, for programs (evaluate)",
    "results.md": "the table above, as Markdown (evaluate)",
}


def write_report(base_model: str, run_dir: Path) -> Path:
    """Write the page about a run and return where it is.

    Raises:
        SettingError: if the run's folder holds nothing to report.
    """
    run_dir = Path(run_dir)
    if not any((run_dir / name).exists() for name in FILES):
        raise SettingError(
            f"`run_dir` must hold a run to report, got {run_dir} without any of its files. "
            "Check the path, or run the verb `fit`, which makes rollouts and latents on its way."
        )
    path = run_dir / REPORT_FILE
    write_text(path, render(page_data(base_model, run_dir)))
    print(f"report: wrote {path}", flush=True)
    return path


def render(data: Mapping[str, Any]) -> str:
    """Fill the template."""
    script = source(SCRIPT)
    return fill(
        "report.html.jinja",
        {**data, "script": script, "script_digest": digest(script)},
        number=number,
        percent=percent,
        spread=spread,
        runs=marked_runs,
    )


def page_data(base_model: str, run_dir: Path) -> dict[str, Any]:
    """Gather everything that the template shows."""
    contents = read_contents(run_dir)
    rows = {row["method"]: row for row in contents.rows}
    provenance = contents.vocabulary.provenance if contents.vocabulary else {}
    return {
        "base_model": Path(base_model).name if Path(base_model).is_absolute() else base_model,
        "benchmark": contents.rows[0]["benchmark"] if contents.rows else None,
        "lead": lead(contents, run_date(run_dir)),
        "num_latents": len(contents.vocabulary) if contents.vocabulary else None,
        "methods": [method_name(row) for row in contents.rows],
        "headline": headline(rows.get("vanilla"), rows.get("lar")),
        "result_table": result_table(contents.rows),
        "evaluation": contents.settings,
        "horizons": horizons(contents.curves, rows),
        "plots": training_plots(contents.curves),
        "small_plots": small_plots(contents.curves, contents.alarms),
        "alarms": contents.alarms,
        "boundary": boundary_plot(contents.stages),
        "stages": contents.stages,
        "held_out_facts": named_facts(last_values(contents.curves), HELD_OUT_FACTS, strict=True),
        "latents": latents(contents),
        "usage_columns": {
            name: title
            for name, title in USAGE.items()
            if any(name in counts for counts in contents.usage.values())
        },
        "tasks": task_table(contents.episodes),
        "examples": examples(contents),
        "samples": contents.samples,
        "mining_facts": named_facts(provenance.get("report", {}), MINING_FACTS),
        "mining_settings": provenance.get("mining", {}),
        "config": contents.config,
        "versions": versions(),
        "files": run_files(run_dir),
        "missing": missing_parts(contents),
    }


def missing_parts(contents: RunContents) -> dict[str, str]:
    """Name the verb that makes each part of the page that is missing."""
    is_mined = contents.vocabulary is not None
    is_evaluated = len(contents.episodes) == 2
    parts = {
        "results": (bool(contents.rows), "evaluate"),
        "training": (bool(contents.curves), "fit"),
        "latents": (is_mined, "mine"),
        "emitted": ("lar" in contents.episodes, "evaluate"),
        "examples": (is_mined and is_evaluated and contents.export is not None, "evaluate"),
        "mining": (is_mined, "mine"),
    }
    if is_evaluated and contents.export is None:
        parts["examples"] = (False, "export")
    return {part: verb for part, (is_there, verb) in parts.items() if not is_there}


def lead(contents: RunContents, day: str) -> str:
    """Say in a few words what the run is."""
    parts = ["No latent actions yet."]
    if contents.vocabulary is not None:
        count = number(len(contents.vocabulary))
        parts = [
            f"{count} latent actions: symbols for token segments that the model keeps writing."
        ]
    if contents.rows:
        num_tasks, num_runs = (contents.rows[0][key] for key in ("num_tasks", "num_runs"))
        runs = "one run" if num_runs == 1 else f"{num_runs} runs"
        parts.append(f"Judged on {number(num_tasks)} held-out tasks, {runs} of each method.")
    return " ".join([*parts, f"{day}."])


def run_date(run_dir: Path) -> str:
    """Return the day on which the latest of the run's files was written."""
    times = [(run_dir / name).stat().st_mtime for name in FILES if (run_dir / name).exists()]
    return date.fromtimestamp(max(times)).isoformat()


def headline(vanilla: Row | None, lar: Row | None) -> dict[str, Any] | None:
    """Return the figures on top: what latents save apart from what the text's length does."""
    if vanilla is None or lar is None:
        return None
    return {
        "vanilla": vanilla,
        "lar": lar,
        "saved_by_latents": 1 - lar["units_per_expanded_token"],
        "change_of_text": lar["expanded_tokens"] / max(vanilla["expanded_tokens"], 1) - 1,
        "floor": vanilla["agreement"] if vanilla["num_runs"] > 1 else None,
    }


def result_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one entry a column of the results, with its values by method."""
    return [
        {"name": name, "meaning": meaning, "cells": [_result_cell(row, key) for row in rows]}
        for key, (name, meaning) in RESULT_COLUMNS.items()
        if any(key in row for row in rows)
    ]


def _result_cell(row: Row, key: str) -> tuple[str, str]:
    """Return a value and what stands below it."""
    is_vanilla = row["method"] == "vanilla"
    if key not in row or (key == "adoption_rate" and is_vanilla):
        return NOTHING, ""
    if key == "agreement" and is_vanilla:
        return (number(row[key]), "floor") if row["num_runs"] > 1 else (NOTHING, "one run only")
    if key == "generated_units" and not is_vanilla:
        return number(row[key]), percent(row["generated_units_against_vanilla"], signed=True)
    values = row.get(SPREADS.get(key, ""))
    below = spread(values) if values else ""
    if key == "score" and row.get("against_vanilla"):
        below += f"; p = {row['against_vanilla']['mcnemar_p']:.2g} against vanilla"
    return number(row[key]), below


def method_name(row: Row) -> str:
    """Return how the page writes a method."""
    return "LAR" if row["method"] == "lar" else row["method"]


def horizons(curves: Curves, rows: Mapping[str, Row]) -> list[tuple[str, float, float]]:
    """Return what the horizon was in base tokens and is in units: where, before, after."""
    last = last_values(curves)
    pairs = [
        ("Held-out trajectories, as the base model wrote them", "val/horizon"),
        ("Their prompts, which are only read", "val/prompt"),
        ("Short texts that the student wrote in training", "gen/horizon"),
    ]
    found = [
        (where, last[f"{key}_tokens"], last[f"{key}_units"])
        for where, key in pairs
        if f"{key}_tokens" in last and f"{key}_units" in last
    ]
    lar = rows.get("lar")
    if lar is not None:
        told = "Answers of LAR to held-out tasks: the text, and the steps it took"
        found.append((told, lar["expanded_tokens"], lar["generated_units"]))
    return found


def latents(contents: RunContents) -> list[BrowsedLatent]:
    """Return the rows of the vocabulary browser."""
    vocabulary, episodes = contents.vocabulary, contents.episodes.get("lar", {})
    if vocabulary is None:
        return []
    emitted = count_latents(vocabulary, (episode.units for episode in episodes.values()))
    uses = [contents.mined_uses]
    if contents.export is not None:
        tokenizer = load_tokenizer(contents.export)
        for task, episode in episodes.items():
            pieces = pieces_of(tokenizer, vocabulary, episode.units)
            uses.append(written_uses(vocabulary, task, pieces))
    return browsed_latents(vocabulary, episodes.values(), emitted, contents.usage, uses)


def task_table(episodes: Mapping[str, Mapping[str, Episode]]) -> list[dict[str, Any]]:
    """Return the held-out tasks that both methods have played."""
    vanilla, lar = episodes.get("vanilla", {}), episodes.get("lar", {})
    solved_by = {
        (True, True): "both",
        (True, False): "vanilla only",
        (False, True): "LAR only",
        (False, False): "neither",
    }
    return [
        {
            "task": task,
            "solved_by": solved_by[vanilla[task].is_success, lar[task].is_success],
            "vanilla": vanilla[task],
            "lar": lar[task],
            "shared": shared_prefix_share(vanilla[task].text, lar[task].text),
        }
        for task in lar
        if task in vanilla
    ]


def examples(contents: RunContents) -> list[Example]:
    """Return held-out answers of both methods, where all is there that they need."""
    if contents.vocabulary is None or contents.export is None or len(contents.episodes) < 2:
        return []
    tokenizer = load_tokenizer(contents.export)
    vanilla, lar = contents.episodes["vanilla"], contents.episodes["lar"]
    return make_examples(tokenizer, contents.vocabulary, vanilla, lar)


def named_facts(
    values: Mapping[str, Any], names: Mapping[str, tuple[str, str]], *, strict: bool = False
) -> Facts:
    """Put names and meanings to values; keys without a name follow as they are, unless `strict`."""
    known = {key: values[key] for key in names if key in values}
    others = {} if strict else {key: value for key, value in values.items() if key not in names}
    facts = []
    for key, value in {**known, **others}.items():
        name, meaning = names.get(key, (key.replace("_", " "), ""))
        facts.append((name, number(value), meaning))
    return facts


def last_values(curves: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Return each metric's value at its last step."""
    return {name: values[max(values)] for name, values in curves.items()}


def run_files(run_dir: Path) -> list[tuple[str, str, str]]:
    """Return the files and folders of a run that are there: name, size, and what they are."""
    return [
        (name + ("/" if (run_dir / name).is_dir() else ""), _size(run_dir / name), meaning)
        for name, meaning in FILES.items()
        if (run_dir / name).exists()
    ]


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = float(sum(file.stat().st_size for file in files))
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def number(value: Any) -> str:
    """Write a number for people; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    if 0 < abs(value) < 0.001:
        return f"{value:.1g}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def spread(values: Sequence[float]) -> str:
    """Write an interval or range."""
    return " to ".join(map(number, values))


def percent(value: float, *, signed: bool = False) -> str:
    """Write a share as a percentage; a change gets a decimal and its sign, with a true minus."""
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.0f}"
    return text.replace("-", "\u2212") + "\u00a0%"
