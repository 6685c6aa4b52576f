"""From played episodes to one row a cell: what a method did on a benchmark with a backbone.

A cell holds runs of several seeds (of training) and of several repetitions (which differ in
batching only). Values of a task are averaged over the runs of its cell; intervals are over tasks.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lar_lightning.agents.episode import Episode
from lar_lightning.evaluation.results.cells import CellKey, CellRun
from lar_lightning.evaluation.results.comparison import agreement, compare_cells, mean_known
from lar_lightning.evaluation.results.measures import (
    MEASURES,
    action_tokens,
    expanded_tokens,
    is_solved,
    total_generated,
    total_prompt,
)
from lar_lightning.evaluation.results.statistics import bootstrap_interval

__all__ = ["CellRun", "Row", "cell_row", "grid_rows"]

Row = dict[str, Any]


def grid_rows(
    runs: Iterable[CellRun],
    *,
    groups: Mapping[str, Mapping[str, str]] | None = None,
    prices: Mapping[str, Sequence[float]] | None = None,
) -> list[Row]:
    """Return one row a cell, in the order in which the cells first occur.

    Args:
        runs: Of all cells.
        groups: Benchmark -> task -> group that is reported apart; tasks without one are left out.
        prices: Backbone -> price of a million prompt units and of a million generated ones.
    """
    cells: dict[CellKey, list[CellRun]] = defaultdict(list)
    for run in runs:
        cells[run.key].append(run)
    return [
        cell_row(
            cell,
            vanilla=cells.get((backbone, benchmark, "vanilla", ""), ()),
            react=cells.get((backbone, benchmark, "react", ""), ()),
            prices=(prices or {}).get(backbone),
            groups=(groups or {}).get(benchmark),
        )
        for (backbone, benchmark, _, _), cell in cells.items()
    ]


def cell_row(
    runs: Sequence[CellRun],
    *,
    vanilla: Sequence[CellRun] = (),
    react: Sequence[CellRun] = (),
    prices: Sequence[float] | None = None,
    groups: Mapping[str, str] | None = None,
) -> Row:
    """Summarize one cell.

    Counts are means per episode. What has no value (no second run, no vanilla cell, no prices) is
    None. Tasks that not all runs of the cell have played are left out, and counted.

    Args:
        runs: Of one backbone, benchmark and method, over seeds and repetitions.
        vanilla: Runs of Vanilla on the same benchmark with the same backbone, where there are any.
        react: The same of ReAct.
        prices: Of a million prompt units and of a million generated ones.
        groups: Task -> group that is reported apart.

    Raises:
        ValueError: If there are no runs, they are of several cells, or share no task.
    """
    if len({run.key for run in runs}) != 1:
        raise ValueError(f"`runs` must be of one cell, got {sorted({run.key for run in runs})}.")
    tables = [run.by_task for run in runs]
    tasks = [task for task in tables[0] if all(task in table for table in tables)]
    if not tasks:
        raise ValueError(f"the runs of {runs[0].key} must share at least one task, got none.")
    first = runs[0]
    episodes = [table[task] for table in tables for task in tasks]
    return {
        "backbone": first.backbone,
        "benchmark": first.benchmark,
        "method": first.method,
        "learned_on": first.key[3],
        "num_tasks": len(tasks),
        "num_tasks_left_out": len({task for table in tables for task in table}) - len(tasks),
        "num_seeds": len({run.seed for run in runs}),
        "num_runs": len(runs),
        **_scores(runs, tasks),
        "metrics": _metrics(episodes),
        "groups": _groups(runs, tasks, groups or {}),
        **{name: _mean(measure, episodes) for name, measure in MEASURES.items()},
        **_latents(episodes),
        "reparameterization_rate": mean_known([run.reparameterization_rate for run in runs]),
        "mined_rate": mean_known([run.mined_rate for run in runs]),
        **agreement(runs, vanilla),
        **_troubles(episodes),
        **_times(runs, episodes),
        "cost_per_1000_episodes": _cost(episodes, prices),
        "against": {
            name: compare_cells(runs, others)
            for name, others in (("vanilla", vanilla), ("react", react))
            if others and others[0].key != first.key
        },
        "by_run": [_run_row(run) for run in runs],
    }


def _mean(measure: Callable[[Episode], float], episodes: Sequence[Episode]) -> float:
    return float(np.mean([measure(episode) for episode in episodes]))


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _scores(runs: Sequence[CellRun], tasks: Sequence[str]) -> Row:
    values = np.array([[is_solved(run.by_task[task]) for task in tasks] for run in runs])
    seeds = sorted({run.seed for run in runs})
    chosen = {seed: [run.seed == seed for run in runs] for seed in seeds}
    by_seed = {str(seed): float(values[chosen[seed]].mean()) for seed in seeds}
    return {
        "score": float(values.mean()),
        "score_interval_95": list(bootstrap_interval(values.mean(0).tolist())),
        "score_by_seed": by_seed,
        "score_deviation_over_seeds": (
            float(np.std(list(by_seed.values()), ddof=1)) if len(seeds) > 1 else None
        ),
    }


def _metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Average the other scores; a failed episode without one has 0, as its score is."""
    names = dict.fromkeys(name for episode in episodes for name in episode.outcome.metrics)
    return {
        name: float(
            np.mean(
                [
                    episode.outcome.metrics.get(name, 0.0)
                    for episode in episodes
                    if name in episode.outcome.metrics or episode.failure
                ]
            )
        )
        for name in names
    }


def _groups(runs: Sequence[CellRun], tasks: Sequence[str], groups: Mapping[str, str]) -> Row:
    members: dict[str, list[str]] = defaultdict(list)
    for task in tasks:
        if groups.get(task):
            members[groups[task]].append(task)
    return {
        group: {"num_tasks": len(chosen), **_scores(runs, chosen)}
        for group, chosen in members.items()
    }


def _latents(episodes: Sequence[Episode]) -> Row:
    acts = [request for episode in episodes for request in episode.acts]
    num_latents = sum(request.num_latents for request in acts)
    num_units = sum(len(request.units) for request in acts)
    return {
        "units_per_expanded_token": _ratio(
            num_units, sum(request.num_expanded_tokens for request in acts)
        ),
        "adoption": _ratio(num_latents, sum(request.num_places for request in acts)),
    }


def _troubles(episodes: Sequence[Episode]) -> Row:
    reasons = Counter(" ".join(e.failure.split()) for e in episodes if e.failure)
    num_actions = sum(len(episode.steps) for episode in episodes)
    # An action may take several requests, of which only the last can be finished.
    num_cut = sum(
        max(len(episode.steps) - sum(request.is_finished for request in episode.acts), 0)
        for episode in episodes
    )
    return {
        "num_episodes": len(episodes),
        "num_failed": sum(reasons.values()),
        "failures": dict(reasons.most_common()),
        "cut_share": num_cut / num_actions if num_actions else 0.0,
    }


def _times(runs: Sequence[CellRun], episodes: Sequence[Episode]) -> Row:
    seconds = [run.wall_clock_seconds for run in runs]
    speeds = [_speed(run) for run in runs]
    latencies = [episode.seconds for episode in episodes]
    known = [speed for speed in speeds if speed is not None]
    return {
        "wall_clock_seconds": float(np.mean(seconds)),
        "wall_clock_seconds_range": [min(seconds), max(seconds)],
        "expanded_tokens_per_second": mean_known(speeds),
        "expanded_tokens_per_second_range": [min(known), max(known)] if known else None,
        "latency_seconds": float(np.mean(latencies)),
        "latency_seconds_95th": float(np.quantile(latencies, 0.95)),
    }


def _speed(run: CellRun) -> float | None:
    return _ratio(sum(map(expanded_tokens, run.episodes)), run.wall_clock_seconds)


def _cost(episodes: Sequence[Episode], prices: Sequence[float] | None) -> float | None:
    """Price all that the model read and wrote, without a discount for cached prefixes."""
    if prices is None:
        return None
    price_in, price_out = prices
    units = price_in * _mean(total_prompt, episodes) + price_out * _mean(total_generated, episodes)
    return 1000 * units / 1e6


def _run_row(run: CellRun) -> Row:
    return {
        "seed": run.seed,
        "run": run.run,
        "num_tasks": len(run.episodes),
        "score": _mean(is_solved, run.episodes),
        "action_tokens": _mean(action_tokens, run.episodes),
        "num_failed": sum(bool(episode.failure) for episode in run.episodes),
        "wall_clock_seconds": run.wall_clock_seconds,
        "expanded_tokens_per_second": _speed(run),
        "reparameterization_rate": run.reparameterization_rate,
    }
