"""Numbers that compare runs: confidence intervals over tasks, agreement of texts."""

from collections.abc import Sequence

import numpy as np


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of one value a task."""
    observed = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(observed), (num_resamples, len(observed)))
    means = observed[draws].mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def shared_prefix_share(left: str, right: str) -> float:
    """Return the share of the longer text before the two part; 1 is equality."""
    longest = max(len(left), len(right))
    if longest == 0:
        return 1.0
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index / longest
    return min(len(left), len(right)) / longest


def mean_agreement(texts: dict[str, str], others: dict[str, str]) -> float:
    """Return the mean shared prefix over tasks."""
    return float(
        np.mean([shared_prefix_share(texts[task_id], others[task_id]) for task_id in texts])
    )


def identical_share(texts: dict[str, str], others: dict[str, str]) -> float:
    """Return the share of tasks with the very same text."""
    return float(np.mean([texts[task_id] == others[task_id] for task_id in texts]))
