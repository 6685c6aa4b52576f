"""Benchmarks by name; a benchmark's module is imported when it is asked for, not before."""

import difflib
import importlib

from lar_lightning.benchmarks.benchmark import Benchmark, Outcome, Task, split_tasks
from lar_lightning.errors import SettingError

__all__ = ["Benchmark", "Outcome", "Task", "load_benchmark", "split_tasks"]

BENCHMARKS = {"humaneval": "lar_lightning.benchmarks.humaneval:HumanEval"}
"""Name of each benchmark -> `module:class`; the class is made without arguments."""


def load_benchmark(name: str) -> Benchmark:
    """Make the benchmark called `name`.

    Raises:
        SettingError: If no benchmark has that name.
    """
    if name not in BENCHMARKS:
        close = difflib.get_close_matches(name.lower(), BENCHMARKS)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise SettingError(
            f"`benchmark` must be one of {', '.join(map(repr, BENCHMARKS))}, got {name!r}.{hint}"
        )
    module, _, class_name = BENCHMARKS[name].partition(":")
    return getattr(importlib.import_module(module), class_name)()
