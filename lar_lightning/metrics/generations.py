"""Short texts that the student writes while it is trained, after prompts of held-out trajectories.

Greedy, from the weights in training, in units: what is served. Nothing is drawn by chance, so
training goes on as if nothing had been written. Of several processes each writes its share.

`callbacks.HorizonMetrics` has them written; every callback with a method `on_generation` is given
them, so that one generation serves all who look at it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from lar_lightning.evaluation.results.statistics import shared_prefix_share
from lar_lightning.mining.realizations import canonical_form
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tokenizer import decode
from lar_lightning.trajectories import Trajectory

if TYPE_CHECKING:
    import lightning as L
    from transformers import PreTrainedTokenizerFast

    from lar_lightning.models.student import Student


@dataclass(frozen=True, kw_only=True)
class GenerationPrompt:
    """What stands before an action of a held-out trajectory."""

    trajectory_id: str
    task_id: str
    units: tuple[int, ...]
    num_tokens: int
    """Base tokens that the units stand for."""
    teacher_tokens: tuple[int, ...] | None
    """The action that the teacher wrote there; None where it was not greedy."""


@dataclass(frozen=True, kw_only=True)
class GeneratedSample:
    """What the student wrote after a prompt."""

    prompt: GenerationPrompt
    units: tuple[int, ...]
    """With the one that ends the turn, if it was reached."""
    tokens: tuple[int, ...]
    """That they expand to."""
    is_finished: bool
    """False where the token limit cut it."""
    text: str
    teacher_text: str | None
    """Of the teacher's action, up to the same limit."""

    @property
    def agreement(self) -> float | None:
        """Share of the text before it parts from the teacher's; None where that is not greedy."""
        if self.teacher_text is None:
            return None
        return shared_prefix_share(self.text, self.teacher_text)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was written at one moment of training."""

    step: int
    """Steps that training had done."""
    samples: tuple[GeneratedSample, ...]
    """Of all processes, in the order of the prompts."""
    seconds: float
    """That this process spent on its share, and on collecting the others'."""


@runtime_checkable
class GenerationListener(Protocol):
    """A callback that is told what was written, in all processes alike."""

    def on_generation(
        self, trainer: "L.Trainer", pl_module: "L.LightningModule", generation: Generation
    ) -> None:
        """Look at it."""
        ...


def held_out_prompts(
    trajectories: Sequence[Trajectory],
    vocabulary: LatentVocabulary,
    *,
    num_prompts: int,
    max_length: float,
) -> list[GenerationPrompt]:
    """Choose prompts: one a task, spread evenly over tasks, and over actions where there are more.

    Args:
        trajectories: Of which greedy ones are taken where there are any.
        vocabulary: Encodes the prompts.
        num_prompts: Most that are chosen.
        max_length: Most base tokens of a prompt; longer ones are left out.
    """
    greedy = [item for item in trajectories if item.temperature == 0]
    by_task = {item.task_id: item for item in reversed(greedy or trajectories)}
    tasks = sorted(by_task)
    prompts = [
        _prompt_of(canonical_form(by_task[task], vocabulary.classes), vocabulary, place)
        for place, task in enumerate(tasks)
    ]
    fitting = [prompt for prompt in prompts if prompt.num_tokens <= max_length]
    places = np.linspace(0, len(fitting) - 1, min(num_prompts, len(fitting))).round().astype(int)
    return [fitting[place] for place in places]


def _prompt_of(
    trajectory: Trajectory, vocabulary: LatentVocabulary, place: int
) -> GenerationPrompt:
    actions = trajectory.action_spans
    action = actions[place % len(actions)]
    before = [span for span in trajectory.spans if span.end <= action.start]
    # Span by span, as training encodes them.
    units = [
        unit
        for span in before
        for unit in vocabulary.encode(trajectory.token_ids[span.start : span.end].tolist())
    ]
    is_greedy = trajectory.temperature == 0
    tokens = trajectory.token_ids[action.start : action.end].tolist()
    return GenerationPrompt(
        trajectory_id=trajectory.trajectory_id,
        task_id=trajectory.task_id,
        units=tuple(units),
        num_tokens=action.start,
        teacher_tokens=tuple(tokens) if is_greedy else None,
    )


def generate(
    student: "Student",
    vocabulary: LatentVocabulary,
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[GenerationPrompt],
    *,
    max_tokens: int,
) -> list[GeneratedSample]:
    """Let the student continue prompts, in one batch.

    Args:
        student: As it is being trained.
        vocabulary: Expands what it writes.
        tokenizer: The base model's.
        prompts: May be none.
        max_tokens: Limit in expanded tokens; the last unit may cross it.
    """
    import torch

    from lar_lightning.training.sampling import sample_units

    if not prompts:
        return []
    written = sample_units(
        student,
        [prompt.units for prompt in prompts],
        torch.Generator(),  # greedy: nothing is drawn from it
        stop_units=student.stop_units,
        max_tokens=max_tokens,
        temperature=0.0,
    )
    return [
        _sample_of(prompt, sample.units, sample.is_finished, vocabulary, tokenizer, max_tokens)
        for prompt, sample in zip(prompts, written, strict=True)
    ]


def _sample_of(
    prompt: GenerationPrompt,
    units: Sequence[int],
    is_finished: bool,
    vocabulary: LatentVocabulary,
    tokenizer: "PreTrainedTokenizerFast",
    max_tokens: int,
) -> GeneratedSample:
    tokens, teacher = vocabulary.expand(units), prompt.teacher_tokens
    return GeneratedSample(
        prompt=prompt,
        units=tuple(units),
        tokens=tuple(tokens),
        is_finished=is_finished,
        # Both up to the limit: behind it, one of them might go on and the other not.
        text=decode(tokenizer, tokens[:max_tokens]),
        teacher_text=None if teacher is None else decode(tokenizer, teacher[:max_tokens]),
    )


def write_together(
    student: "Student",
    vocabulary: LatentVocabulary,
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[GenerationPrompt],
    *,
    max_tokens: int,
    step: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> tuple[Generation, list[GeneratedSample], float]:
    """Let all processes write, each its share of the prompts.

    Returns:
        What all have written; what this one has; the seconds that its writing took.
    """
    start = time.perf_counter()
    own = generate(student, vocabulary, tokenizer, prompts[rank::num_ranks], max_tokens=max_tokens)
    seconds = time.perf_counter() - start
    shares = [own]
    if num_ranks > 1:
        import torch.distributed

        gathered: list[list[GeneratedSample] | None] = [None] * num_ranks
        torch.distributed.all_gather_object(gathered, own)
        shares = [share or [] for share in gathered]
    samples = tuple(shares[index % num_ranks][index // num_ranks] for index in range(len(prompts)))
    whole = time.perf_counter() - start
    return Generation(step=step, samples=samples, seconds=whole), own, seconds


def repeated_ngrams(tokens: Sequence[int], size: int = 4) -> tuple[int, int]:
    """Return how many n-grams of a text stood in it before, and how many it has."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return len(grams) - len(set(grams)), len(grams)
