"""What stands below tables: how much they rest on, and what failed."""

from collections.abc import Mapping, Sequence
from typing import Any

from lar_lightning.evaluation.tables.names import (
    BENCHMARKS,
    backbone_name,
    benchmark_name,
    in_order,
    method_name,
)

Row = Mapping[str, Any]

SIGNIFICANT = 0.05
MOST_REASONS = 3
"""Reasons of failure that a note names."""
MOST_CELLS = 5
"""Cells with failures that a note names."""


def count_note(rows: Sequence[Row]) -> str:
    """Say how many tasks, seeds and runs each benchmark's cells have."""
    told: dict[str, list[str]] = {}
    for benchmark in in_order((row["benchmark"] for row in rows), BENCHMARKS):
        cells = [row for row in rows if row["benchmark"] == benchmark]
        counts = [
            _range([row[key] for row in cells], unit)
            for key, unit in (("num_tasks", "task"), ("num_seeds", "seed"), ("num_runs", "run"))
        ]
        left_out = sum(row["num_tasks_left_out"] for row in cells)
        note = f" ({left_out} played by some runs only, left out)" if left_out else ""
        told.setdefault(f"{', '.join(counts)} a cell{note}", []).append(benchmark_name(benchmark))
    return "; ".join(f"{', '.join(names)}: {counts}" for counts, names in told.items()) + "."


def failure_notes(rows: Sequence[Row]) -> list[str]:
    """Say which cells have failed episodes, how many, and why; those with most first."""
    failed = sorted((row for row in rows if row["num_failed"]), key=lambda row: -row["num_failed"])
    if not failed:
        return []
    told = [failure_note(row) for row in failed[:MOST_CELLS]]
    rest = failed[MOST_CELLS:]
    if rest:
        told.append(f"{sum(row['num_failed'] for row in rest)} in {len(rest)} more cells")
    return [f"Failed episodes, counted as they are scored: {'; '.join(told)}."]


def transfer_notes(cells: Sequence[str]) -> list[str]:
    """Say where the dashes are whose cells were learned on another benchmark alone."""
    return [f"Learned on another benchmark, and in Table 2: {'; '.join(cells)}."] if cells else []


def cells_without(absent: Mapping[tuple[str, str], Sequence[str]], num_columns: int) -> list[str]:
    """Name cells that a table lacks, a method that has none at all as one.

    Args:
        absent: Backbone and method -> columns without results.
        num_columns: Of the table.
    """
    return [
        f"{backbone}, {method}: {'all' if len(names) == num_columns else ', '.join(names)}"
        for (backbone, method), names in absent.items()
    ]


def failure_note(row: Row) -> str:
    """Say how many episodes of a cell failed, and the most frequent reasons."""
    reasons = list(row["failures"].items())
    told = [f"{count} \u00d7 {reason}" for reason, count in reasons[:MOST_REASONS]]
    if len(reasons) > MOST_REASONS:
        told.append(f"{len(reasons) - MOST_REASONS} more reasons")
    return f"{cell_name(row)} {row['num_failed']} of {row['num_episodes']} ({', '.join(told)})"


def cell_name(row: Row) -> str:
    """Return how a cell is written."""
    return ", ".join(
        (
            backbone_name(row["backbone"]),
            benchmark_name(row["benchmark"]),
            method_name(row["method"], row["learned_on"]),
        )
    )


def _range(values: Sequence[int], unit: str) -> str:
    least, most = min(values), max(values)
    plural = "" if most == 1 else "s"
    return f"{least} {unit}{plural}" if least == most else f"{least} to {most} {unit}{plural}"
