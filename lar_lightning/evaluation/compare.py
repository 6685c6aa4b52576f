"""Vanilla against LAR on held-out tasks: the result table as JSON, Markdown and text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lar_lightning.agents import load_agent
from lar_lightning.artefacts import write_json, write_text
from lar_lightning.benchmarks import benchmark_identity, load_benchmark
from lar_lightning.benchmarks.sandbox import isolation_report
from lar_lightning.evaluation.results.cells import CellRun
from lar_lightning.evaluation.results.comparison import compare_cells
from lar_lightning.evaluation.results.statistics import (
    bootstrap_interval,
    identical_share,
    mean_agreement,
)
from lar_lightning.evaluation.runner import Course, Method, MethodRun, evaluate_method, open_engine
from lar_lightning.export.checkpoint import export_run
from lar_lightning.rollouts.roll_out import split_benchmark
from lar_lightning.run_folder import base_checkpoint
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import EvaluationSettings, RolloutSettings

Row = dict[str, Any]


def evaluate_run(
    base_model: str,
    benchmark: str,
    run_dir: Path,
    rollouts: RolloutSettings,
    settings: EvaluationSettings,
) -> list[Row]:
    """Compare the base model and the run's export on the held-out tasks.

    Write and print the table.
    """
    export = export_run(base_model, run_dir)
    _, tasks = split_benchmark(benchmark, rollouts)
    vocabulary = LatentVocabulary.load(export)  # of a run in stages, the latents that held
    methods = [
        Method(label=label, agent=load_agent(label, {"style": rollouts.style}), **served)
        for label, served in {
            # With the vocabulary, though it has no rows: it tells where a latent could have been.
            "vanilla": {"checkpoint": base_checkpoint(base_model), "vocabulary": vocabulary},
            "lar": {"checkpoint": export, "vocabulary": vocabulary},
        }.items()
    ]
    loaded = load_benchmark(benchmark)
    course = Course(benchmark=loaded, identity=benchmark_identity(benchmark))
    for sentence in isolation_report():
        print(f"evaluate: model-written code is not fully isolated here: {sentence}", flush=True)
    with open_engine(settings) as engine:
        runs = {
            method.label: evaluate_method(
                method, course, tasks, run_dir / "evaluation", settings, engine
            )
            for method in methods
        }
    rows = [result_row(runs[label], runs["vanilla"], loaded.name) for label in runs]
    table = markdown_table(rows)
    write_json(run_dir / "results.json", rows)
    write_text(run_dir / "results.md", table)
    print(table, flush=True)
    print(f"evaluate: wrote {run_dir / 'results.json'} and {run_dir / 'results.md'}", flush=True)
    return rows


def result_row(runs: Sequence[MethodRun], vanilla: Sequence[MethodRun], benchmark: str) -> Row:
    """Summarize a method's runs.

    Counts are those of its first run, times are means over runs with their range.

    Agreement is the shared prefix with vanilla texts, beside it the share of identical ones; for
    vanilla itself, that of its different runs: the floor. Other methods are held against vanilla
    task by task, see `compare_cells`.
    """
    first = runs[0]
    seconds = [run.wall_clock_seconds for run in runs]
    speeds = [_expanded(run) / run.wall_clock_seconds for run in runs]
    scores = [float(np.mean([episode.is_success for episode in run.episodes])) for run in runs]
    per_task = np.mean([[episode.is_success for episode in run.episodes] for run in runs], axis=0)
    pairs = [(a, b) for a in runs for b in vanilla if a is not b]
    agreements = [mean_agreement(_texts(a), _texts(b)) for a, b in pairs]
    identical = [identical_share(_texts(a), _texts(b)) for a, b in pairs]
    num_places = sum(episode.num_places for episode in first.episodes)
    num_latents = sum(episode.num_latents for episode in first.episodes)
    generated = sum(len(episode.units) for episode in first.episodes)
    reference = sum(len(episode.units) for episode in vanilla[0].episodes)
    low, high = bootstrap_interval(per_task.tolist())
    return {
        "method": first.method,
        "benchmark": benchmark,
        "score": round(float(np.mean(scores)), 4),
        "score_interval_95": [round(low, 4), round(high, 4)],
        "score_by_run": [round(score, 4) for score in scores],
        "num_tasks": len(first.episodes),
        "num_runs": len(runs),
        "prompt_tokens": sum(episode.num_prompt_units for episode in first.episodes),
        "generated_units": generated,
        "generated_units_by_run": [
            sum(len(episode.units) for episode in run.episodes) for run in runs
        ],
        "generated_units_against_vanilla": round(generated / reference - 1, 4),
        "expanded_tokens": _expanded(first),
        "expanded_tokens_against_vanilla": round(_expanded(first) / _expanded(vanilla[0]) - 1, 4),
        "units_per_expanded_token": round(generated / _expanded(first), 4),
        "latents_emitted": num_latents,
        "adoption_rate": round(num_latents / num_places, 4) if num_places else 0.0,
        "failed_episodes": sum(bool(episode.failure) for episode in first.episodes),
        "finished_share": round(
            float(np.mean([episode.is_finished for episode in first.episodes])), 4
        ),
        "wall_clock_seconds": round(float(np.mean(seconds)), 3),
        "wall_clock_seconds_range": [min(seconds), max(seconds)],
        "expanded_tokens_per_second": round(float(np.mean(speeds)), 2),
        "expanded_tokens_per_second_range": [round(min(speeds), 2), round(max(speeds), 2)],
        "agreement": round(float(np.mean(agreements)), 4) if agreements else 1.0,
        "identical_texts": round(float(np.mean(identical)), 4) if identical else 1.0,
        "against_vanilla": (
            None
            if first.method == vanilla[0].method
            else compare_cells(_cells(runs, benchmark), _cells(vanilla, benchmark))
        ),
    }


def _cells(runs: Sequence[MethodRun], benchmark: str) -> list[CellRun]:
    return [
        CellRun(
            backbone="",
            benchmark=benchmark,
            method=run.method,
            seed=0,
            run=run.run,
            episodes=run.episodes,
            wall_clock_seconds=run.wall_clock_seconds,
        )
        for run in runs
    ]


def _expanded(run: MethodRun) -> int:
    return sum(episode.num_expanded_tokens for episode in run.episodes)


def _texts(run: MethodRun) -> dict[str, str]:
    return {episode.task_id: episode.text for episode in run.episodes}


COLUMNS = {
    "method": "method",
    "score": "score",
    "score_interval_95": "95 % interval",
    "prompt_tokens": "prompt units",
    "generated_units": "generated units",
    "expanded_tokens": "expanded tokens",
    "units_per_expanded_token": "units / token",
    "latents_emitted": "latents",
    "adoption_rate": "adoption",
    "wall_clock_seconds": "seconds",
    "expanded_tokens_per_second": "expanded tokens/s",
    "agreement": "agreement with vanilla",
    "identical_texts": "identical texts",
}


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table with what the columns need to be read."""
    head = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + " --- |" * len(COLUMNS)]
    lines = ["| " + " | ".join(_cell(row[key]) for key in COLUMNS) + " |" for row in rows]
    notes = (
        f"\n{rows[0]['benchmark']}, {rows[0]['num_tasks']} held-out tasks, greedy, "
        f"{rows[0]['num_runs']} runs of each "
        "method in the same engine. Agreement: share of the text before it parts from the vanilla "
        "text; beside it the share of tasks with the same text; in the vanilla row, between "
        "vanilla's own runs (the floor).\n"
    )
    return "\n".join([*head, *lines]) + "\n" + notes + "".join(map(verdict, rows))


def verdict(row: Row) -> str:
    """Say what was lost and what was saved against vanilla, and whether chance explains it."""
    against = row["against_vanilla"]
    if against is None:
        return ""
    low, high = against["score_difference_interval_95"]
    units = ""
    if against["action_tokens_change"] is not None:
        least, most = against["action_tokens_change_interval_95"]
        units = (
            f"; generated units {_signed(against['action_tokens_change'])} % "
            f"({_signed(least)} to {_signed(most)}), from "
            f"{_signed(row['expanded_tokens_against_vanilla'])} % text and "
            f"{_signed(row['units_per_expanded_token'] - 1)} % units per token"
        )
    return (
        f"\n{row['method']} against vanilla on the same tasks (95 % intervals): score "
        f"{_signed(against['score_difference'])} points ({_signed(low)} to {_signed(high)}), "
        f"p = {against['mcnemar_p']:.2g} of McNemar's exact test{units}.\n"
    )


def _signed(share: float) -> str:
    """Write a share in hundredths, a change with its sign."""
    return f"{100 * share:+.1f}"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_cell(entry) for entry in value)
    return (
        f"{value:.3f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
