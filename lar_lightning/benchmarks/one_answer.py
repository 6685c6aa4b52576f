"""The world of tasks that are one answer: it takes the answer, and the benchmark scores it."""

from collections.abc import Callable
from dataclasses import dataclass

from lar_lightning.benchmarks.benchmark import Observation, Outcome, Task


@dataclass(kw_only=True)
class OneAnswer:
    """An environment whose only step ends the episode."""

    task: Task
    score: Callable[[Task, str], Outcome]
    """Task, text of the answer -> outcome; an answer that was never given is empty."""
    text: str = ""

    def step(self, action: str) -> Observation:
        """Take the answer."""
        self.text = action
        return Observation(text="The answer is given.", is_over=True)

    def outcome(self) -> Outcome:
        """Score it."""
        return self.score(self.task, self.text)
