"""What a benchmark is: tasks, what the policy is told of them, and the world it acts in.

An *episode* is one task in one `Style`. The policy reads `Benchmark.messages`, writes an action,
and the environment answers with an observation, until the episode is over; then `outcome` scores
it. A benchmark without tools is an environment of one step.

Actions write their thoughts between `<think>` and `</think>` (styles `cot` and `react`) in every
benchmark, so that methods which shorten thoughts find them without knowing the benchmark.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lar_lightning.errors import SettingError
from lar_lightning.settings import Style

STYLES: tuple[Style, ...] = ("direct", "cot", "react")
"""How a task is put to the policy: the task and the output format, nothing else; with reasoning
step by step before the answer; in thought, action and observation turns."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One problem of a benchmark."""

    task_id: str
    """Name of the task, unique within its benchmark."""

    question: str
    """The problem itself, the same text in every style; what compressors are told is the task."""

    record: Mapping[str, Any]
    """What environment and scorer need, as JSON; never shown to the policy."""

    is_held_out: bool | None = None
    """The benchmark's own split; None where it has none, and `split_tasks` draws one."""

    group: str = ""
    """Part of the benchmark that is reported apart: `cross_website`."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The score of one episode."""

    task_id: str
    """Name of the task."""

    is_success: bool
    """Whether the task is solved, by the benchmark's own rule; the mean of it is the score."""

    detail: str
    """The reason in a few words: "passed", "timed out after 5 s", "AssertionError"."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Other scores, each between 0 and 1, e.g. `f1`, `element_accuracy`."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the environment answers to an action."""

    text: str
    """The next user message; not shown where the episode is over."""

    is_over: bool = False
    """Whether the episode ends here."""


class Environment(Protocol):
    """The world of one episode; used by one thread at a time, each step perhaps by another."""

    def step(self, action: str) -> Observation:
        """Carry out an action, given as the whole text that the policy wrote, without hints.

        What the policy did wrong (no action, a malformed call) is an observation that says so. An
        exception ends the episode as failed; the run goes on.
        """
        ...

    def outcome(self) -> Outcome:
        """Score what has happened so far, also where the episode was cut off: called once."""
        ...


class Benchmark(Protocol):
    """A set of tasks whose episodes can be scored without a human."""

    name: str

    styles: tuple[Style, ...]
    """Those that the benchmark has; one step or a fixed course of events leaves out `react`."""

    markers: tuple[str, ...]
    """Texts with which an action or answer begins, e.g. `<search>`: what precedes the first one
    in an action without think tags is its thought."""

    def load_tasks(self) -> list[Task]:
        """Return all tasks in the order of the benchmark."""
        ...

    def messages(self, task: Task, style: Style) -> list[dict[str, str]]:
        """Return what the policy is told at first: chat messages with `role` and `content`."""
        ...

    def stops(self, style: Style) -> tuple[str, ...]:
        """Return the texts that end an action, e.g. `</search>`; they belong to it."""
        ...

    def max_turns(self, style: Style) -> int:
        """Return how many actions an episode may have."""
        ...

    def open(self, task: Task, style: Style) -> Environment:
        """Make the environment of one episode; safe to call from several threads at once."""
        ...


def split_tasks(
    tasks: Sequence[Task], num_held_out: int, seed: int, name: str = ""
) -> tuple[list[Task], list[Task]]:
    """Split into training tasks and `num_held_out` held-out ones, both sorted by draw.

    A task's draw is a hash of the seed and its id, so the split depends neither on the order of
    `tasks` nor on the Python version, and a task that is added moves at most one other. Where the
    benchmark has a split of its own, held-out tasks are drawn from its held-out part, what is left
    of that is not used, and all its training tasks are for training.

    Args:
        tasks: Of one benchmark.
        num_held_out: Of each benchmark.
        seed: Of the draw.
        name: Of the benchmark, for what is said of too few tasks.

    Returns:
        The training tasks and the held-out tasks.
    """
    task_ids = {task.task_id for task in tasks}
    if len(task_ids) < len(tasks):
        raise SettingError(
            f"`tasks` must have unique task ids, got {len(tasks)} tasks with {len(task_ids)} ids. "
            "Remove the duplicates, or a task may be both trained on and held out."
        )
    if len(tasks) < 2:
        raise SettingError(f"`tasks` must hold at least 2 tasks to be split, got {len(tasks)}.")
    candidates = [task for task in tasks if task.is_held_out is not False]
    has_own = any(task.is_held_out is not None for task in tasks)
    most = len(candidates) if has_own else len(tasks) - 1
    if not 1 <= num_held_out <= most:
        raise SettingError(
            f"`num_held_out` must be between 1 and {most}{f' on {name}' if name else ''}, "
            + ("the benchmark's own held-out tasks" if has_own else "one less than all tasks")
            + f", got {num_held_out!r}. Each side of the split needs at least one task."
        )

    held_out = sorted(candidates, key=lambda task: draw(task, seed))[:num_held_out]
    kept = {task.task_id for task in held_out}
    training = [task for task in tasks if task.is_held_out is not True and task.task_id not in kept]
    return sorted(training, key=lambda task: draw(task, seed)), held_out


def draw(task: Task, seed: int) -> bytes:
    """Return a task's place in the drawing of lots."""
    return hashlib.sha256(f"{seed}/{task.task_id}".encode()).digest()
