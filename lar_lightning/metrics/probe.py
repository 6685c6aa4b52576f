"""A few held-out tasks, played by the student while it is trained: does it still solve them?

The same scheduler, environments and scorers as in evaluation; only the engine is another: the
weights in training, greedy, a batch of requests at a time.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lar_lightning.agents.agent import TurnAgent
from lar_lightning.agents.play import Limits, Player, Scheduler
from lar_lightning.benchmarks import Benchmark, Task
from lar_lightning.benchmarks.benchmark import Style
from lar_lightning.policies import Completion, Request, Sampling
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tokenizer import decode
from lar_lightning.training.sampling import sample_units

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lar_lightning.models.student import Student


class StudentPolicy:
    """A student in training as the engine of agents."""

    entropy_kind = "exact"

    def __init__(
        self, student: "Student", tokenizer: "PreTrainedTokenizerFast", num_concurrent: int
    ) -> None:
        """Wrap it; stops are searched in the text that the extended tokenizer gives units."""
        self.student, self.tokenizer = student, tokenizer
        self.num_concurrent = num_concurrent
        self.waiting: list[tuple[Request, Sampling]] = []

    def submit(self, request: Request, sampling: Sampling) -> None:
        """Put a request in line."""
        assert request.temperature == 0, "a probe is greedy"
        self.waiting.append((request, sampling))

    def step(self) -> list[Completion]:
        """Decode one batch to its end: requests that are to be continued alike."""
        if not self.waiting:
            return []
        sampling = self.waiting[0][1]
        batch = [request for request, other in self.waiting if other == sampling]
        batch = batch[: self.num_concurrent]
        chosen = {request.request_id for request in batch}
        self.waiting = [pair for pair in self.waiting if pair[0].request_id not in chosen]
        samples = sample_units(
            self.student,
            [request.prompt_ids for request in batch],
            torch.Generator(),  # greedy: nothing is drawn from it
            stop_units=self.student.stop_units,
            max_tokens=sampling.max_tokens,
            temperature=0.0,
        )
        return [
            self._completion(request, sample.units, sample.is_finished, sampling.stops)
            for request, sample in zip(batch, samples, strict=True)
        ]

    def abort(self) -> None:
        """Empty the line."""
        self.waiting.clear()

    def _completion(
        self, request: Request, units: list[int], is_finished: bool, stops: tuple[str, ...]
    ) -> Completion:
        """Cut behind the unit that completes a stop."""
        for number in range(1, len(units) + 1) if stops else ():
            text = decode(self.tokenizer, units[:number], skip_special_tokens=True)
            if any(stop in text for stop in stops):
                units, is_finished = units[:number], True
                break
        return Completion(request_id=request.request_id, token_ids=units, is_finished=is_finished)


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What came of one process's share of the tasks."""

    num_tasks: int
    num_solved: int
    num_failed: int
    """Episodes that could not be played to their end; they count as not solved."""
    seconds: float


def probe(
    policy: StudentPolicy,
    benchmark: Benchmark,
    style: Style,
    tasks: Sequence[Task],
    vocabulary: LatentVocabulary,
    *,
    max_tokens: int,
    max_model_len: int,
) -> Probed:
    """Have the student play tasks.

    Args:
        policy: The student.
        benchmark: Whose tasks, environments and scores.
        style: Of its prompts: that of the rollouts.
        tasks: May be none.
        vocabulary: The latents in play.
        max_tokens: Longest action in expanded tokens.
        max_model_len: Longest prompt with its action, in units.
    """
    start = time.perf_counter()
    limits = Limits(
        max_tokens=max_tokens,
        max_model_len=max_model_len,
        num_concurrent=policy.num_concurrent,
    )
    agent = TurnAgent(style=style)
    scheduler = Scheduler(agent, benchmark, policy, policy.tokenizer, vocabulary, limits)
    players = [Player(key=task.task_id, task=task) for task in tasks]
    episodes = [played.episode for played in scheduler.play(players)]
    return Probed(
        num_tasks=len(episodes),
        num_solved=sum(episode.outcome.is_success for episode in episodes),
        num_failed=sum(bool(episode.failure) for episode in episodes),
        seconds=time.perf_counter() - start,
    )
