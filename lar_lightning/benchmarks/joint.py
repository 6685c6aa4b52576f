"""Several benchmarks as one: their tasks together, each played and scored as in its own.

Task ids begin with the name of the part, `mbpp/11`, and `Task.group` names it as well, so that
scores can be told apart. Each part is split as it is by itself: what is held out of `mbpp` is held
out of `humaneval+mbpp` too, and what is learned from the whole may be tried on each part.
"""

from collections.abc import Sequence
from dataclasses import replace

from lar_lightning.benchmarks.benchmark import (
    STYLES,
    Benchmark,
    Environment,
    Observation,
    Outcome,
    Style,
    Task,
    draw,
    split_tasks,
)
from lar_lightning.errors import SettingError


class JointBenchmark:
    """Benchmarks joined into one."""

    def __init__(self, parts: Sequence[Benchmark]) -> None:
        """Join benchmarks of different names."""
        self.parts = {part.name: part for part in parts}
        self.name = "+".join(part.name for part in parts)
        if len(self.parts) < len(parts) or not parts:
            raise SettingError(
                f"`benchmark` must join benchmarks of different names, got {self.name!r}. "
                "Put the records of one benchmark into one file."
            )
        self.styles: tuple[Style, ...] = tuple(
            style for style in STYLES if all(style in part.styles for part in parts)
        )
        if not self.styles:
            raise SettingError(
                f"`benchmark` must join benchmarks with a common style, got {self.name!r}: "
                + "; ".join(f"{part.name} has {', '.join(part.styles)}" for part in parts)
                + ". Run them one by one."
            )
        markers = (marker for part in parts for marker in part.markers)
        self.markers = tuple(dict.fromkeys(markers))

    def load_tasks(self) -> list[Task]:
        """Return the tasks of all parts, part by part."""
        return [
            _prefixed(name, task) for name, part in self.parts.items() for task in part.load_tasks()
        ]

    def split(self, num_held_out: int, seed: int) -> tuple[list[Task], list[Task]]:
        """Split each part, with `num_held_out` held-out tasks of each; training tasks mixed."""
        training, held_out = [], []
        for name, part in self.parts.items():
            sides = split_tasks(part.load_tasks(), num_held_out, seed, name)
            for whole, side in zip((training, held_out), sides, strict=True):
                whole += [_prefixed(name, task) for task in side]
        return sorted(training, key=lambda task: draw(task, seed)), held_out

    def messages(self, task: Task, style: Style) -> list[dict[str, str]]:
        """Return what the policy is told at first by the task's own benchmark."""
        part, own = self._own(task)
        return part.messages(own, style)

    def stops(self, style: Style) -> tuple[str, ...]:
        """Return the texts that end an action in any part."""
        stops = (stop for part in self.parts.values() for stop in part.stops(style))
        return tuple(dict.fromkeys(stops))

    def max_turns(self, style: Style) -> int:
        """Return how many actions the longest episodes may have."""
        return max(part.max_turns(style) for part in self.parts.values())

    def open(self, task: Task, style: Style) -> Environment:
        """Make the environment of the task's own benchmark."""
        part, own = self._own(task)
        return _PartEnvironment(part.open(own, style), task.task_id, part.max_turns(style))

    def _own(self, task: Task) -> tuple[Benchmark, Task]:
        name, _, task_id = task.task_id.partition("/")
        group = task.group.removeprefix(name).removeprefix("/")
        return self.parts[name], replace(task, task_id=task_id, group=group)


def _prefixed(name: str, task: Task) -> Task:
    group = f"{name}/{task.group}" if task.group else name
    return replace(task, task_id=f"{name}/{task.task_id}", group=group)


class _PartEnvironment:
    """The environment of a part, with the turns of the part and the ids of the whole."""

    def __init__(self, environment: Environment, task_id: str, num_left: int) -> None:
        self.environment = environment
        self.task_id = task_id
        self.num_left = num_left

    def step(self, action: str) -> Observation:
        observation = self.environment.step(action)
        self.num_left -= 1
        return observation if self.num_left > 0 else replace(observation, is_over=True)

    def outcome(self) -> Outcome:
        return replace(self.environment.outcome(), task_id=self.task_id)
