"""ACON: the context is compressed by a model that follows a guideline (Kang et al. 2025).

Two things are compressed, each where it is longer than a threshold: an observation before it
enters the session, and the history of the session after a step. A compressed history opens a new
session: the first messages with the summary, then the last turns, as they were written. The
compressor is the served model itself; what it reads and writes is counted as help.

`prepare` can make the guidelines better on training tasks; see `acon_optimization`.
"""

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lar_lightning.agents.agent import Act, Ask, Play, Session, TurnAgent
from lar_lightning.agents.conversation import Conversation
from lar_lightning.agents.guidelines.templates import (
    HISTORY_GUIDELINE,
    HISTORY_HEADING,
    HISTORY_VARIABLES,
    OBSERVATION_GUIDELINE,
    OBSERVATION_HEADING,
    OBSERVATION_VARIABLES,
    add_summary,
    check_guideline,
    compressor_prompt,
    parse_answer,
    render_turns,
    tag_previous,
)
from lar_lightning.benchmarks.benchmark import Observation, Style
from lar_lightning.errors import SettingError

if TYPE_CHECKING:
    from lar_lightning.agents.workshop import Prepared, Workshop

_LEAST = {
    "history_threshold": -1,
    "observation_threshold": -1,
    "keep_last_turns": 0,
    "min_turn_interval": 1,
    "summary_tokens": 1,
    "num_ut_rounds": 0,
    "num_co_rounds": 0,
    "num_candidates": 1,
    "max_records": 1,
    "num_optimization_tasks": 1,
    "num_selection_tasks": 1,
    "optimizer_model_len": 1024,
    "optimizer_tokens": 1,
}
_CHOICES = {"type": ("history", "obs", "unified"), "summary_rule": ("reset", "accumulate")}


@dataclass(kw_only=True)
class _Memory:
    """What one episode remembers beside its conversation; the agent itself is shared by all."""

    head: list[dict[str, str]]
    """The first messages, without a summary."""
    summary: str = ""
    """The latest one, all that were accumulated included."""
    num_turns: int = 0
    """Turns since the last compression of the history."""


@dataclass(frozen=True, kw_only=True)
class Acon(TurnAgent):
    """The base model with a compressed context."""

    name: ClassVar[str] = "acon"

    style: Style = "react"
    """How tasks are put to the policy, where the benchmark has that style; else `direct`."""
    type: Literal["history", "obs", "unified"] = "unified"
    """What is compressed: the history, observations, or both."""
    history_threshold: int = 2048
    """A history of more tokens is compressed, the earlier summary included; -1: always."""
    observation_threshold: int = 1024
    """An observation of more tokens is compressed; -1: always."""
    keep_last_turns: int = 1
    """Turns that stay verbatim, each an action and its observation."""
    summary_rule: Literal["reset", "accumulate"] = "reset"
    """Whether a summary replaces the earlier one, or is put behind it."""
    min_turn_interval: int = 1
    """Fewest turns between two compressions of the history."""
    summary_tokens: int = 1024
    """Most tokens that the compressor writes; never more than half of the context."""
    compresses_task: bool | None = None
    """Whether the longest paragraph that the policy is told at first, such as a page, counts as an
    observation. None: where an episode has one action, because nothing else can be compressed
    there. The question and the other paragraphs stay verbatim, so that no answer format is lost."""
    history_guideline: str = HISTORY_GUIDELINE
    """Template with the variables {task}, {prev_summary} and {history}."""
    observation_guideline: str = OBSERVATION_GUIDELINE
    """Template with the variables {task}, {observation} and {history}."""

    num_ut_rounds: int = 0
    """Rounds that optimise the guidelines for success ("utility")."""
    num_co_rounds: int = 0
    """Rounds after those that optimise them for length at equal success ("compression")."""
    num_candidates: int = 5
    """New guidelines that a round tries."""
    max_records: int = 30
    """Most feedback records that a new guideline is made from."""
    num_optimization_tasks: int = 100
    """Training tasks that a round learns from."""
    num_selection_tasks: int = 50
    """Those of them that candidates are compared on."""
    optimizer: str = ""
    """Model that writes feedback and guidelines: a folder, hub id or `pypi:<distribution>`; empty:
    the base model itself."""
    optimizer_model_len: int = 8192
    """Longest prompt with its answer of the optimizer, in tokens; its own limit where lower."""
    optimizer_tokens: int = 2048
    """Most tokens of one of its answers; never more than a third of its context."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise SettingError(
                    f"`methods.acon.{name}` must be one of {', '.join(map(repr, choices))}, got "
                    f"{getattr(self, name)!r}."
                )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingError(
                    f"`methods.acon.{name}` must be a whole number of at least {least}, got "
                    f"{value!r}."
                )
        check_guideline("history_guideline", self.history_guideline, HISTORY_VARIABLES)
        check_guideline("observation_guideline", self.observation_guideline, OBSERVATION_VARIABLES)

    @property
    def learns(self) -> bool:
        """Guidelines are optimised with a fixed seed: the grid's makes no difference."""
        return False

    @property
    def needs_training_tasks(self) -> bool:
        """Guidelines are optimised on them."""
        return self.num_ut_rounds + self.num_co_rounds > 0

    def prepare(self, workshop: "Workshop") -> "Prepared":
        """Optimise the guidelines on training tasks, as many rounds as asked for."""
        from lar_lightning.agents.guidelines.rounds import optimize
        from lar_lightning.agents.workshop import Prepared

        guidelines = optimize(self, workshop) if self.needs_training_tasks else {}
        return Prepared(
            agent=dataclasses.replace(self, **guidelines), checkpoint=workshop.checkpoint
        )

    def play(self, session: Session) -> Play:
        """Play turn by turn; what is compressed is what a next action will read."""
        memory = _Memory(head=(yield from self._refine_task(session)))
        conversation = session.start(memory.head)
        num_turns = session.benchmark.max_turns(self.style_for(session.benchmark))
        for turn in range(num_turns):
            action = yield from self.act(session, conversation)
            observation: Observation = yield action
            if observation.is_over or turn == num_turns - 1:
                return
            text = yield from self.observe(session, conversation, observation.text)
            conversation.add_observation(text)
            conversation = yield from self._compress(session, conversation, memory)
            session.conversation = conversation

    def observe(
        self, session: Session, conversation: Conversation, text: str
    ) -> Generator[Ask | Act, Any, str]:
        """Return the observation, refined where it is long."""
        turns = conversation.turns[conversation.num_first :]
        return (yield from self._refine(session, text, render_turns(turns)))

    def _refine(self, session: Session, text: str, history: str) -> Generator[Ask | Act, Any, str]:
        """Have the compressor refine a text that counts as an observation."""
        if self.type == "history" or not _exceeds(session, text, self.observation_threshold):
            return text
        values = {"task": session.task.question, "observation": text, "history": history}
        answer = yield from self._ask(session, self.observation_guideline, values)
        return parse_answer(answer, OBSERVATION_HEADING) or text

    def _refine_task(self, session: Session) -> Generator[Ask | Act, Any, list[dict[str, str]]]:
        """Return the first messages, with the longest paragraph of the last one refined."""
        messages = [dict(message) for message in self.messages(session)]
        is_wanted = self.compresses_task
        if is_wanted is None:
            is_wanted = session.benchmark.max_turns(self.style_for(session.benchmark)) == 1
        if is_wanted:
            content = messages[-1]["content"]
            paragraph = longest_paragraph(content, session.task.question)
            if paragraph:
                refined = yield from self._refine(session, paragraph, "")
                messages[-1]["content"] = content.replace(paragraph, refined, 1)
        return messages

    def _compress(
        self, session: Session, conversation: Conversation, memory: _Memory
    ) -> Generator[Ask | Act, Any, Conversation]:
        """Return the session to go on with: a new one if the history was compressed."""
        memory.num_turns += 1
        if self.type == "obs" or memory.num_turns < self.min_turn_interval:
            return conversation
        split = split_index(conversation, self.keep_last_turns)
        body = render_turns(conversation.turns[conversation.num_first : split])
        measured = f"{memory.summary}\n{body}"
        if not body or not _exceeds(session, measured, self.history_threshold):
            return conversation
        values = {
            "task": session.task.question,
            "prev_summary": tag_previous(memory.summary),
            "history": body,
        }
        answer = yield from self._ask(session, self.history_guideline, values)
        summary = parse_answer(answer, HISTORY_HEADING)
        if not summary:  # an empty summary would lose the history: the session stays as it is
            return conversation
        if self.summary_rule == "accumulate" and memory.summary:
            summary = f"{memory.summary}\n\n{summary}"
        memory.summary, memory.num_turns = summary, 0
        kept = conversation.turns[split:]
        return conversation.restarted(add_summary(memory.head, summary), kept)

    def _ask(
        self, session: Session, guideline: str, values: dict[str, str]
    ) -> Generator[Ask | Act, Any, str]:
        """Ask the compressor; an empty answer where the request does not fit the context."""
        num_answer = min(self.summary_tokens, session.max_model_len // 2)
        room = session.max_model_len - num_answer
        prompt = compressor_prompt(session.tokenizer, guideline, values, room)
        if prompt is None or num_answer < 1:
            return ""
        reply = yield Ask(prompt_ids=prompt, max_tokens=num_answer, purpose="help")
        return reply.text


def split_index(conversation: Conversation, num_kept: int) -> int:
    """Return where the last `num_kept` turns begin, each an action with what follows it."""
    starts = [index for index, turn in enumerate(conversation.turns) if turn.units is not None]
    if num_kept == 0:
        return len(conversation.turns)
    return starts[-num_kept] if num_kept <= len(starts) else conversation.num_first


def longest_paragraph(content: str, question: str) -> str:
    """Return the longest paragraph of a message outside the question, wherever that stands."""
    parts = content.split(question) if question else [content]
    return max((text for part in parts for text in part.split("\n\n")), key=len).strip()


def _exceeds(session: Session, text: str, threshold: int) -> bool:
    return threshold == -1 or session.count_tokens(text) > threshold
