"""What a benchmark is: tasks for the policy and a scorer for its responses."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lar_lightning.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class Task:
    """One problem of a benchmark."""

    task_id: str
    """Name of the task, unique within its benchmark."""

    messages: tuple[dict[str, str], ...]
    """Chat messages shown to the policy, each with `role` and `content`."""

    record: dict[str, str]
    """What the scorer needs; never shown to the policy."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The score of one response."""

    task_id: str
    """Name of the task that was answered."""

    is_success: bool
    """Whether the response solves the task."""

    detail: str
    """The reason in a few words: "passed", "timed out after 5 s", "AssertionError"."""


class Benchmark(Protocol):
    """A set of tasks whose responses can be scored without a human."""

    name: str

    def load_tasks(self) -> list[Task]:
        """Return all tasks in the order of the benchmark."""
        ...

    def score(self, task: Task, response: str) -> Outcome:
        """Score one response; safe to call from several threads at once."""
        ...


def split_tasks(
    tasks: Sequence[Task], num_held_out: int, seed: int
) -> tuple[list[Task], list[Task]]:
    """Split into training tasks and `num_held_out` held-out ones, both sorted by draw.

    A task's draw is a hash of the seed and its id, so the split depends neither on the order of
    `tasks` nor on the Python version, and a task that is added moves at most one other.

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
    if not 1 <= num_held_out <= len(tasks) - 1:
        raise SettingError(
            f"`num_held_out` must be between 1 and {len(tasks) - 1}, one less than the number of "
            f"tasks, got {num_held_out!r}. Each side of the split needs at least one task."
        )

    def draw(task: Task) -> bytes:
        return hashlib.sha256(f"{seed}/{task.task_id}".encode()).digest()

    drawn = sorted(tasks, key=draw)
    return drawn[num_held_out:], drawn[:num_held_out]
