"""All that is known of every cell, in four tables: score, length, latents, and time and trouble."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lar_lightning.evaluation.report import number, percent
from lar_lightning.evaluation.tables.formats import Cell, Table, TableRow
from lar_lightning.evaluation.tables.names import (
    BENCHMARKS,
    METHODS,
    backbone_name,
    benchmark_name,
    distinct_names,
    in_order,
    method_name,
)
from lar_lightning.evaluation.tables.notes import count_note, failure_notes

Row = Mapping[str, Any]
Column = tuple[str, str, Callable[[Any], str], str]
"""Path of the value in the row, heading, how it is written, path of its interval."""


def _points(value: float) -> str:
    return f"{100 * value:.2f}"


def _signed_points(value: float) -> str:
    return f"{100 * value:+.2f}".replace("-", "\u2212")


def _change(value: float) -> str:
    return percent(value, signed=True)


SCORE: tuple[Column, ...] = (
    ("num_tasks", "tasks", number, ""),
    ("num_seeds", "seeds", number, ""),
    ("num_runs", "runs", number, ""),
    ("score", "score (95 %)", _points, "score_interval_95"),
    ("score_deviation_over_seeds", "SD of seeds", _points, ""),
    (
        "against.vanilla.score_difference",
        "to Vanilla (95 %)",
        _signed_points,
        "against.vanilla.score_difference_interval_95",
    ),
    ("against.vanilla.mcnemar_p", "p", number, ""),
    (
        "against.react.score_difference",
        "to ReAct (95 %)",
        _signed_points,
        "against.react.score_difference_interval_95",
    ),
    ("against.react.mcnemar_p", "p", number, ""),
)
LENGTH: tuple[Column, ...] = (
    ("action_tokens", "action tokens", number, ""),
    (
        "against.vanilla.action_tokens_change",
        "to Vanilla (95 %)",
        _change,
        "against.vanilla.action_tokens_change_interval_95",
    ),
    (
        "against.react.action_tokens_change",
        "to ReAct (95 %)",
        _change,
        "against.react.action_tokens_change_interval_95",
    ),
    ("generated_units", "generated", number, ""),
    ("hint_units", "hints", number, ""),
    ("prompt_units", "prompt", number, ""),
    ("help_prompt_units", "help prompt", number, ""),
    ("help_generated_units", "help generated", number, ""),
    ("turns", "turns", number, ""),
    ("peak_units", "peak", number, ""),
    ("dependency", "dependency", number, ""),
)
LATENTS: tuple[Column, ...] = (
    ("expanded_tokens", "expanded tokens", number, ""),
    ("units_per_expanded_token", "units / token", number, ""),
    ("latents", "latents", number, ""),
    ("adoption", "adoption", number, ""),
    ("reparameterization_rate", "rate", number, ""),
    ("mined_rate", "mined rate", number, ""),
    ("agreement", "agreement", number, ""),
    ("agreement_floor", "its floor", number, ""),
    ("identical_texts", "identical texts", number, ""),
    ("identical_texts_floor", "their floor", number, ""),
)
TIME: tuple[Column, ...] = (
    ("wall_clock_seconds", "seconds (range)", number, "wall_clock_seconds_range"),
    (
        "expanded_tokens_per_second",
        "expanded tokens/s (range)",
        number,
        "expanded_tokens_per_second_range",
    ),
    ("latency_seconds", "seconds an episode", number, ""),
    ("latency_seconds_95th", "95th percentile", number, ""),
    ("cost_per_1000_episodes", "cost of 1000 episodes", number, ""),
    ("num_episodes", "episodes", number, ""),
    ("num_failed", "failed", number, ""),
    ("cut_share", "actions cut", percent, ""),
)


def long_tables(rows: Sequence[Row]) -> list[Table]:
    """Return the four tables; columns without any value are left out."""
    metrics = dict.fromkeys(name for row in rows for name in row["metrics"])
    score = (*SCORE, *((f"metrics.{name}", name, _points, "") for name in metrics))
    return [
        _table(
            "long-score",
            "Scores in percent, and their differences in points; p of McNemar's exact test.",
            rows,
            score,
            "Intervals are bootstrap intervals over tasks, of means over all runs. p is that of "
            "the first run of each seed; with several seeds it joins their tests so that it holds "
            "whatever their dependence.",
        ),
        _table(
            "long-length",
            "Length, in units per episode.",
            rows,
            LENGTH,
            "Action tokens: generated units of actions and hints. Help: requests that write no "
            "action, such as a compressor's. Peak: longest context with its action. Dependency: "
            "generated times read units, summed over requests for actions.",
        ),
        _table(
            "long-latents",
            "Latents, and agreement with Vanilla's text.",
            rows,
            LATENTS,
            "Adoption: latents written, of the places for them in the same text. Rate: share of "
            "action tokens inside latents, of the text played and of that which was mined. "
            "Agreement: share of a text before it parts from Vanilla's; its floor is that of "
            "Vanilla's own runs.",
        ),
        _table(
            "long-time",
            "Time, cost and trouble.",
            rows,
            TIME,
            "Seconds are wall clock of a run with all its tasks; those of an episode pass among "
            "all that play at once. Cost counts all that is read and written, cached or not.",
            *failure_notes(rows),
        ),
    ]


def _table(
    name: str, title: str, rows: Sequence[Row], columns: Sequence[Column], *notes: str
) -> Table:
    known = [column for column in columns if any(_at(row, column[0]) is not None for row in rows)]
    backbones = distinct_names((row["backbone"] for row in rows), backbone_name)
    benchmarks = distinct_names((row["benchmark"] for row in rows), benchmark_name)
    orders = (
        list(backbones),
        in_order(benchmarks, BENCHMARKS),
        in_order((row["method"] for row in rows), METHODS),
    )

    def place(row: Row) -> tuple[int, ...]:
        keys = (row["backbone"], row["benchmark"], row["method"])
        return tuple(order.index(key) for order, key in zip(orders, keys, strict=True))

    return Table(
        name=name,
        title=title,
        label_columns=("Backbone", "Benchmark", "Method"),
        columns=tuple(heading for _, heading, _, _ in known),
        rows=tuple(
            TableRow(
                labels=(
                    backbones[row["backbone"]],
                    benchmarks[row["benchmark"]],
                    method_name(row["method"], row["learned_on"]),
                ),
                cells=tuple(_cell(row, column) for column in known),
            )
            for row in sorted(rows, key=place)
        ),
        notes=(count_note(rows), *notes),
    )


def _cell(row: Row, column: Column) -> Cell:
    path, _, write, interval_path = column
    value, interval = _at(row, path), _at(row, interval_path) if interval_path else None
    if value is None:
        return Cell()
    below = " to ".join(map(write, interval)) if interval else ""
    return Cell(text=write(value), below=below, value=value)


def _at(row: Row, path: str) -> Any:
    value: Any = row
    is_metric = path.startswith("metrics.")  # whose names may hold dots
    for key in path.split(".", 1 if is_metric else -1):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
