"""What a method is: how it gets ready, and how it plays one episode.

An episode is a generator. It yields an `Ask` where it wants text from the model and is sent a
`Reply`; it yields an `Act` where it acts on the environment and is sent an `Observation`. So a
method reads from top to bottom like a loop for one task, holds no threads and waits for nothing:
`play` runs hundreds of them at once on one engine.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from jaxtyping import Float

from lar_lightning.agents.conversation import Conversation
from lar_lightning.benchmarks.benchmark import Benchmark, Observation, Style, Task
from lar_lightning.segments import LatentVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lar_lightning.agents.workshop import Prepared, Workshop


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request to the served model."""

    prompt_ids: tuple[int, ...]
    """Units that the model reads."""
    max_tokens: int
    """Longest answer in expanded tokens."""
    stops: tuple[str, ...] = ()
    """Texts that end the answer; they belong to it."""
    purpose: Literal["act", "help"] = "act"
    """`act`: an action or a part of one. `help`: anything else, such as a compressor's summary;
    counted apart."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reply:
    """What the model wrote for an `Ask`; N is the number of its units."""

    units: tuple[int, ...]
    """With the turn-end token where one was written."""
    text: str
    """What the environment reads: expanded, without special tokens, cut behind the first stop."""
    is_finished: bool
    """By the model's turn end or a stop; False where `max_tokens` cut it."""
    entropies: Float[np.ndarray, " N"] | None = None
    """Nats of each unit, where the rollout wants them."""


@dataclass(frozen=True, kw_only=True)
class Act:
    """One step of the environment."""

    action: str
    """The whole text of the action, without hints."""
    num_hint_units: int = 0
    """Units that the method itself put into the action; counted as usage."""


Play = Generator[Ask | Act, Any, None]


@dataclass(kw_only=True)
class Session:
    """What an agent knows in one episode."""

    task: Task
    benchmark: Benchmark
    tokenizer: "PreTrainedTokenizerFast"
    """Of the served checkpoint."""
    vocabulary: LatentVocabulary
    """Empty for all methods but LAR."""
    max_tokens: int
    """Longest action in expanded tokens, the same for all methods."""
    max_model_len: int
    """Longest prompt with its answer, in units."""
    conversation: Conversation | None = field(default=None, init=False)
    """The latest one: a rollout's trajectory."""

    def start(self, messages: list[dict[str, str]]) -> Conversation:
        """Begin a conversation with these messages."""
        self.conversation = Conversation(self.tokenizer, messages)
        return self.conversation

    def count_tokens(self, text: str) -> int:
        """Return the number of units of a text in the served model's tokenizer."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


class Agent(Protocol):
    """A method: a frozen dataclass whose fields are its settings."""

    name: ClassVar[str]

    def source_for(self, benchmark: str) -> str:
        """Return the benchmark whose training tasks it learns from, to be tried on another."""
        ...

    @property
    def learns(self) -> bool:
        """Whether seeds make a difference."""
        ...

    @property
    def needs_training_tasks(self) -> bool:
        """Whether `prepare` reads training tasks."""
        ...

    def check(self) -> None:
        """Refuse settings that cannot work, before anything is played.

        Raises:
            SettingError: If something that they name is missing.
        """
        ...

    def prepare(self, workshop: "Workshop") -> "Prepared":
        """Make what the method needs from training tasks: a checkpoint, a guideline, or nothing.

        Kept in the workshop's folder; what is there is not made again.
        """
        ...

    def style_for(self, benchmark: Benchmark) -> Style:
        """Return how tasks of a benchmark are put to the policy."""
        ...

    def play(self, session: Session) -> Play:
        """Play one episode."""
        ...


@dataclass(frozen=True, kw_only=True)
class TurnAgent:
    """Acts, observes, and so on: the loop that the methods share, with places to step in."""

    name: ClassVar[str] = ""

    style: Style = "direct"
    """How tasks are put to the policy, where the benchmark has that style; else `direct`."""
    trained_on: str | Mapping[str, str] = ""
    """Benchmark whose training tasks the method learns from, or one for each that it is tried on:
    `{kodcode: humaneval+mbpp+kodcode}`; default: the one that it is tried on."""

    @property
    def learns(self) -> bool:
        """Whether seeds make a difference: what learns nothing plays alike under each."""
        return False

    @property
    def needs_training_tasks(self) -> bool:
        """Whether `prepare` reads training tasks: by default, what learns does."""
        return self.learns

    def source_for(self, benchmark: str) -> str:
        """Return the benchmark whose training tasks it learns from, to be tried on another."""
        if isinstance(self.trained_on, str):
            return self.trained_on or benchmark
        return self.trained_on.get(benchmark.partition("?")[0], benchmark)

    def check(self) -> None:
        """Accept what the settings have checked by themselves."""

    def prepare(self, workshop: "Workshop") -> "Prepared":
        """Serve the base model as it is."""
        from lar_lightning.agents.workshop import Prepared

        return Prepared(agent=self, checkpoint=workshop.checkpoint)

    def play(self, session: Session) -> Play:
        """Play turn by turn until the episode is over or has had its turns."""
        conversation = session.start(self.messages(session))
        for _ in range(session.benchmark.max_turns(self.style_for(session.benchmark))):
            action = yield from self.act(session, conversation)
            observation: Observation = yield action
            if observation.is_over:
                return
            text = yield from self.observe(session, conversation, observation.text)
            conversation.add_observation(text)
            conversation = yield from self.revise(session, conversation)
            session.conversation = conversation

    def style_for(self, benchmark: Benchmark) -> Style:
        """Return the agent's style, or `direct` where the benchmark lacks it."""
        return self.style if self.style in benchmark.styles else "direct"

    def messages(self, session: Session) -> list[dict[str, str]]:
        """Return what the policy is told at first."""
        return session.benchmark.messages(session.task, self.style_for(session.benchmark))

    def act(self, session: Session, conversation: Conversation) -> Generator[Ask | Act, Any, Act]:
        """Have the model write one action and add it to the conversation."""
        reply: Reply = yield Ask(
            prompt_ids=tuple(conversation.ids),
            max_tokens=session.max_tokens,
            stops=session.benchmark.stops(self.style_for(session.benchmark)),
        )
        conversation.add_action(reply.units, reply.text, reply.entropies)
        return Act(action=reply.text)

    def observe(
        self, session: Session, conversation: Conversation, text: str
    ) -> Generator[Ask | Act, Any, str]:
        """Return the observation as the policy is to read it."""
        yield from ()
        return text

    def revise(
        self, session: Session, conversation: Conversation
    ) -> Generator[Ask | Act, Any, Conversation]:
        """Return the conversation to go on with, after each observation."""
        yield from ()
        return conversation
