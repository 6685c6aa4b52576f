"""Score against reparameterization rate (paper 5.3): rise, peak, and where it begins to cost.

The rate is that of the trajectories that latents were mined from: how much of the action space is
reparameterized. Played text has less, the less so the more latents stand for what is in one task.

Dimensions: K rates, N tasks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lar_lightning.evaluation.results.cells import CellRun
from lar_lightning.evaluation.results.statistics import (
    bootstrap_interval,
    paired_bootstrap_interval,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class AbstractionCurve:
    """One benchmark and backbone at growing strengths of abstraction."""

    name: str
    rates: tuple[float, ...]
    """Growing; means over seeds."""
    scores: Float[np.ndarray, "K N"]
    """Of each task, mean over seeds and repetitions."""
    by_seed: Mapping[int, tuple[tuple[float, float], ...]]
    """Rate and mean score of each seed, by growing rate."""

    @property
    def means(self) -> list[float]:
        """Score at each rate."""
        return self.scores.mean(1).tolist()

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """Bootstrap interval over tasks at each rate."""
        return [bootstrap_interval(row.tolist()) for row in self.scores]

    @property
    def peak(self) -> float:
        """Rate of the best score, the smallest where several are best."""
        return self.rates[int(np.argmax(self.scores.mean(1)))]

    @property
    def boundary(self) -> float:
        """Largest rate that costs nothing that could be shown; at or beyond the peak."""
        return boundary(self.rates, self.scores)


def abstraction_curve(name: str, strengths: Iterable[Sequence[CellRun]]) -> AbstractionCurve:
    """Make a curve from the runs at each strength, on the tasks that all of them have played.

    Args:
        name: Of the curve: its benchmark, and backbone where there are several.
        strengths: Runs of all seeds at one strength, for each; those without latents (Vanilla, or
            the budget 0) have no rate, which is 0.
    """
    cells = [list(runs) for runs in strengths if runs]
    tables = [run.by_task for runs in cells for run in runs]
    tasks = [task for task in tables[0] if all(task in table for table in tables)] if tables else []
    if not tasks:
        raise ValueError(f"the runs of the curve {name!r} must share at least one task, got none.")
    cells.sort(key=_mean_rate)
    seeds = sorted({run.seed for runs in cells for run in runs})
    return AbstractionCurve(
        name=name,
        rates=tuple(map(_mean_rate, cells)),
        scores=np.array([_task_scores(runs, tasks) for runs in cells]),
        by_seed={
            seed: tuple(
                (_mean_rate(chosen), float(np.mean(_task_scores(chosen, tasks))))
                for runs in cells
                if (chosen := [run for run in runs if run.seed == seed])
            )
            for seed in seeds
        },
    )


def boundary(
    rates: Sequence[float],
    scores: Sequence[Sequence[float]] | Float[np.ndarray, "K N"],
    *,
    confidence: float = 0.95,
) -> float:
    """Return the largest rate whose score is not significantly below the best before it.

    A score is significantly below where the paired bootstrap interval of its difference to the best
    score at a smaller rate lies below zero. So the boundary says what could not be shown to cost
    anything: with few tasks it lies too far to the right, never too far to the left but by the
    error rate of the interval. A score that recovers after a collapse is taken at its word.

    Args:
        rates: In any order.
        scores: At each rate one value a task, the same tasks throughout.
        confidence: Of the interval.
    """
    if not len(rates) or len(rates) != len(scores):
        raise ValueError(f"rates and scores must pair, got {len(rates)} and {len(scores)}.")
    values = np.asarray(scores, dtype=np.float64)
    order = np.argsort(rates, kind="stable")
    best, last = order[0], order[0]
    for index in order[1:]:
        _, high = paired_bootstrap_interval(values[index], values[best], confidence=confidence)
        if high >= 0:
            last = index
        if values[index].mean() > values[best].mean():
            best = index
    return float(rates[last])


def _mean_rate(runs: Sequence[CellRun]) -> float:
    return float(np.mean([run.mined_rate or 0.0 for run in runs]))


def _task_scores(runs: Sequence[CellRun], tasks: Sequence[str]) -> Float[np.ndarray, " N"]:
    return np.mean(
        [[run.by_task[task].outcome.is_success for task in tasks] for run in runs], axis=0
    )
