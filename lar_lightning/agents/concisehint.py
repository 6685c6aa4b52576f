"""ConciseHint (arXiv 2506.18810): hints to be concise, put between what the model writes.

The model writes an action in chunks, one request each. Into every chunk of its thought goes a hint,
and the model goes on behind it, as if somebody had reminded it. The rules are those of the paper
(`hints/rules.py` has them): nothing is generated twice, hints become rarer and move towards the end
of their chunks. Each action begins with a short chunk again, and what stands outside the thought,
actions and code, gets no hints and is written in one request.

The environment reads actions without hints, but the model reads on with them, also in later turns.
The limit of an action counts what the model wrote; hints are counted as usage (`num_hint_units`).
With `is_trained` the hint is not a text but trained embeddings (ConciseHint-T,
`hints/training.py`). Decoding is that of all compared methods, where the paper samples.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lar_lightning.agents.agent import Act, Ask, Reply, Session, TurnAgent
from lar_lightning.agents.conversation import Conversation
from lar_lightning.agents.hints.rules import (
    Thought,
    end_of_stop,
    find_place,
    find_thought,
    next_chunk_length,
    num_units_for,
    place_share,
    plain_text,
    split_units,
    without_hints,
)
from lar_lightning.benchmarks.benchmark import Style
from lar_lightning.errors import SettingError
from lar_lightning.tokenizer import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lar_lightning.agents.workshop import Prepared, Workshop

HINT = "-<|im_start|>user\nPlease make the answer concise.<|im_end|>\n-"
ADAPTIVE_SENTENCE = (
    "Fit the length of your answer to how complex the question is: the simpler it is, the more "
    "concise the answer should be."
)


@dataclass(frozen=True, kw_only=True)
class ConciseHint(TurnAgent):
    """Chain of thought with hints in it; the paper's numbers are the defaults."""

    name: ClassVar[str] = "concisehint"

    style: Style = "cot"
    alpha: int = 128
    """Tokens of an action's first chunk."""
    beta: float = 0.2
    """Tokens by which later chunks are longer, for each token of prompt, action and hints."""
    cap: int = 1024
    """Most tokens of a chunk."""
    hint: str = HINT
    """What is put in. Its special tokens are those of ChatML (Qwen, SmolLM): give models with
    another chat template a hint in theirs."""
    is_adaptive_prompt: bool = False
    """Also ask, behind the question, for a length that fits its complexity (AdaP)."""
    places: Literal["thought", "anywhere"] = "thought"
    """`thought`: only there, never in an action or code block. `anywhere`: as in the paper, whose
    tasks have no actions."""
    is_trained: bool = False
    """Train the hint's embeddings on concise thoughts (ConciseHint-T)."""
    gamma: float = 1.0
    """Strength of a trained hint: 1 is as trained, 0 the embeddings of the text `hint`."""
    data: str = ""
    """What to train on: JSON Lines with `question` and `answer`, perhaps `level` (0 to 4, 0 the
    most concise). Empty: thoughts of the model's own, from training tasks."""
    num_tasks: int = 1000
    """Most training tasks to collect thoughts from."""
    keeps_failures: bool = False
    """Also train on thoughts of episodes that failed."""
    max_level: int = 0
    """Train on thoughts up to this level: 0 is the most concise."""
    intervals: tuple[int, ...] = (64, 96, 128, 160, 192)
    """Thought tokens between two hints in training, by level."""
    learning_rate: float = 1e-4
    num_epochs: int = 6
    num_accumulated: int = 4
    """Sequences a step, read one by one."""
    max_length: int = 32768
    """Longest training sequence in units; longer ones are left out."""

    def __post_init__(self) -> None:
        positive = ("alpha", "num_tasks", "num_epochs", "num_accumulated", "max_length")
        rules = {
            **{key: (getattr(self, key) >= 1, "at least 1") for key in positive},
            "beta": (self.beta >= 0, "at least 0"),
            "cap": (self.cap >= self.alpha, f"at least `alpha`, {self.alpha}"),
            "hint": (bool(self.hint.strip()), "a text"),
            "places": (self.places in ("thought", "anywhere"), "'thought' or 'anywhere'"),
            "gamma": (0 <= self.gamma <= 1, "between 0, the text, and 1, as trained"),
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "intervals": (
                len(self.intervals) > 0 and min(self.intervals) >= 1,
                "numbers of 1 or more, one for each level",
            ),
            "max_level": (
                0 <= self.max_level < len(self.intervals),
                f"between 0 and {len(self.intervals) - 1}, since `intervals` has so many levels",
            ),
            "data": (self.is_trained or not self.data, "left out unless `is_trained` is set"),
        }
        for key, (is_kept, rule) in rules.items():
            if not is_kept:
                raise SettingError(
                    f"`methods.concisehint.{key}` must be {rule}, got {getattr(self, key)!r}."
                )

    @property
    def learns(self) -> bool:
        """Whether the hint is trained."""
        return self.is_trained

    @property
    def needs_training_tasks(self) -> bool:
        """A hint is trained on them, unless `data` is given."""
        return self.is_trained and not self.data

    def prepare(self, workshop: "Workshop") -> "Prepared":
        """Serve the base model as it is, or with trained hints as tokens of their own."""
        if not self.is_trained:
            return super().prepare(workshop)
        from lar_lightning.agents.hints.training import prepare_trained_hint

        return prepare_trained_hint(self, workshop)

    def messages(self, session: Session) -> list[dict[str, str]]:
        """Return what the policy is told at first, with AdaP where it is set."""
        messages = super().messages(session)
        if not self.is_adaptive_prompt:
            return messages
        last = max(index for index, message in enumerate(messages) if message["role"] == "user")
        content = f"{messages[last]['content']}\n\n{ADAPTIVE_SENTENCE}"
        return [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]]

    def hint_units(self, tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
        """Return the units of a hint in a served model's tokenizer."""
        if not self.is_trained:
            return tuple(encode_text(tokenizer, self.hint))
        from lar_lightning.agents.hints.training import trained_hint_units

        return trained_hint_units(tokenizer)

    def act(self, session: Session, conversation: Conversation) -> Generator[Ask | Act, Any, Act]:
        """Have the model write one action in chunks, with hints in its thought."""
        writing = _Writing(tokenizer=session.tokenizer)
        hint = self.hint_units(session.tokenizer)
        stops = session.benchmark.stops(self.style_for(session.benchmark))
        length, may_hint = self.alpha, True
        while True:
            prompt_ids = (*conversation.ids, *writing.read)
            room = session.max_model_len - len(prompt_ids)
            room = max(min(room, session.max_tokens - len(writing.written)), 1)
            asked = min(length, room) if may_hint else room
            reply: Reply = yield Ask(prompt_ids=prompt_ids, max_tokens=asked, stops=stops)
            is_stopped = writing.add(reply.units, stops)
            # Fewer units than were asked for: the engine has its own limit, and met it.
            if is_stopped or reply.is_finished or len(reply.units) < asked or asked == room:
                break
            thought = self._places_in(writing.text, session.benchmark.markers)
            num_read = len(conversation.ids) + len(writing.read) + len(hint)
            may_hint = num_read < session.max_model_len
            if may_hint:
                writing.put(hint, place_share(length, self.alpha, self.cap), thought.spans)
                num_read = len(conversation.ids) + len(writing.read)
                length = next_chunk_length(num_read, self.alpha, self.beta, self.cap)
                may_hint = not thought.is_over
        text = without_hints(writing.text, self.hint, plain_text(session.tokenizer, hint))
        conversation.add_action(writing.read, text)
        return Act(action=text, num_hint_units=writing.num_hint_units)

    def _places_in(self, text: str, markers: Sequence[str]) -> Thought:
        """Return where in an action hints may stand, and whether no more will come."""
        if self.places == "anywhere":
            return Thought(spans=((0, len(text)),), is_over=False)
        return find_thought(text, markers)


@dataclass(kw_only=True)
class _Writing:
    """An action that is being written."""

    tokenizer: "PreTrainedTokenizerFast"
    written: list[int] = field(default_factory=list)
    """By the model."""
    read: list[int] = field(default_factory=list)
    """The same with hints: what the model goes on from."""
    text: str = ""
    """What the environment is to read of it."""
    chunk: tuple[int, ...] = ()
    """The latest units of both."""
    num_hint_units: int = 0

    def add(self, units: tuple[int, ...], stops: tuple[str, ...]) -> bool:
        """Add a chunk up to the first stop; return whether there is one, perhaps across chunks."""
        text = plain_text(self.tokenizer, (*self.written, *units))
        end = end_of_stop(text, stops)
        if end is not None:
            num_kept = num_units_for(self.tokenizer, (*self.written, *units), end)
            units = units[: max(num_kept - len(self.written), 0)]
        self.chunk = units
        self.written.extend(units)
        self.read.extend(units)
        self.text = text[:end]
        return end is not None

    def put(self, hint: tuple[int, ...], share: float, spans: tuple[tuple[int, int], ...]) -> None:
        """Put a hint into the latest chunk, if it has a place in these ranges of the action."""
        chunk = plain_text(self.tokenizer, self.chunk)
        # Both texts end alike; a character across the chunks' border may differ at the start.
        shift = len(self.text) - len(chunk)
        place = find_place(chunk, share, [(first - shift, last - shift) for first, last in spans])
        if place is not None:
            before, after = split_units(self.tokenizer, self.chunk, place)
            self.read[len(self.read) - len(self.chunk) :] = [*before, *hint, *after]
            self.num_hint_units += len(hint)
