"""Benchmarks by name; a benchmark's module is imported when it is asked for, not before."""

import importlib
import inspect
from urllib.parse import parse_qsl

from lar_lightning.benchmarks.benchmark import (
    STYLES,
    Benchmark,
    Environment,
    Observation,
    Outcome,
    Style,
    Task,
    split_tasks,
)
from lar_lightning.errors import SettingError, unknown_name

__all__ = [
    "BENCHMARKS",
    "STYLES",
    "Benchmark",
    "Environment",
    "Observation",
    "Outcome",
    "Style",
    "Task",
    "benchmark_identity",
    "load_benchmark",
    "split_benchmark",
    "split_tasks",
]

BENCHMARKS = {
    "humaneval": "lar_lightning.benchmarks.humaneval:HumanEval",
    "mbpp": "lar_lightning.benchmarks.mbpp:Mbpp",
    "kodcode": "lar_lightning.benchmarks.kodcode:KodCode",
    "triviaqa": "lar_lightning.benchmarks.triviaqa:TriviaQA",
    "mind2web": "lar_lightning.benchmarks.mind2web:Mind2Web",
    "bfcl": "lar_lightning.benchmarks.bfcl:Bfcl",
    "bfcl_single": "lar_lightning.benchmarks.bfcl_single:BfclSingle",
}
"""Name of each benchmark -> `module:class`, whose keyword arguments are its options: texts."""


def load_benchmark(text: str) -> Benchmark:
    """Make the benchmark that `text` names, with its options.

    Args:
        text: `humaneval`; with options `mbpp?path=data/mbpp.jsonl&timeout=5`, `%` escapes as in an
            address; several as one `humaneval+mbpp+kodcode`.

    Raises:
        SettingError: If no benchmark has that name, or it has no such option.
    """
    parts = text.split("+")
    if len(parts) > 1:
        from lar_lightning.benchmarks.joint import JointBenchmark

        return JointBenchmark([load_benchmark(part) for part in parts])
    name, _, query = text.partition("?")
    if name not in BENCHMARKS:
        raise unknown_name("benchmark", "be one of", name, BENCHMARKS)
    module, _, class_name = BENCHMARKS[name].partition(":")
    benchmark = getattr(importlib.import_module(module), class_name)
    options = dict(parse_qsl(query, keep_blank_values=True))
    known = list(inspect.signature(benchmark).parameters)
    for key in options:
        if key not in known:
            raise SettingError(
                f"`benchmark: {name}` must have options out of {', '.join(map(repr, known))}, got "
                f"{key!r}. Correct or remove it."
            )
    return benchmark(**options)


def split_benchmark(
    benchmark: Benchmark, num_held_out: int, seed: int
) -> tuple[list[Task], list[Task]]:
    """Return training and held-out tasks; of several benchmarks as one, each is split by itself."""
    from lar_lightning.benchmarks.joint import JointBenchmark

    if isinstance(benchmark, JointBenchmark):
        return benchmark.split(num_held_out, seed)
    return split_tasks(benchmark.load_tasks(), num_held_out, seed, benchmark.name)


def benchmark_identity(text: str) -> str:
    """Return what decides the episodes of a benchmark besides its tasks: names and options.

    Where the records lie does not, and of other files only the names do, so that they may move.
    """
    parts = []
    for part in text.split("+"):
        name, _, query = part.partition("?")
        options = sorted((key, value) for key, value in parse_qsl(query) if key != "path")
        shown = [
            f"{key}={value if '://' in value else _without_folders(value)}"
            for key, value in options
        ]
        parts.append("?".join([name, "&".join(shown)]) if shown else name)
    return "+".join(parts)


def _without_folders(files: str) -> str:
    return ",".join(file.rpartition("/")[2] for file in files.split(","))
