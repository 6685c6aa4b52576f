"""What becomes of plain text that a client sends: units again, by the tokenizer itself.

A server keeps nothing of a conversation. The client sends its history back as text, the engine
renders and encodes it, and the model reads latents where it had written latents, and also in system
prompts, schemas of tools and what stands around observations. Measured are, by role, how many
tokens that saves, and how many of the units are the very ones that the model had written.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from lar_lightning.segments import LatentVocabulary
from lar_lightning.tokenizer import decode, encode_text
from lar_lightning.trajectories import ACTION, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Conversation = Sequence[tuple[str, Sequence[int]]]
"""Roles, and the units that were read or written in each turn."""


@dataclass(frozen=True, kw_only=True)
class Reencoded:
    """Counts over the text of one role, or of several."""

    tokens: int = 0
    """Of the base tokenizer, as the text was first read or written."""
    units: int = 0
    """That the exported tokenizer makes of the text."""
    equal: int = 0
    """Of these, the units that had been read or written there."""

    def __add__(self, other: "Reencoded") -> "Reencoded":
        return Reencoded(
            tokens=self.tokens + other.tokens,
            units=self.units + other.units,
            equal=self.equal + other.equal,
        )

    @property
    def equal_share(self) -> float:
        """Share of the units that are those of before; 1 where there are none."""
        return self.equal / self.units if self.units else 1.0

    @property
    def saving(self) -> float:
        """Share of the tokens that fall away."""
        return 1 - self.units / self.tokens if self.tokens else 0.0


class Reencoder:
    """Sends conversations through the exported tokenizer and counts."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", vocabulary: LatentVocabulary) -> None:
        """Take the tokenizer of an export and its vocabulary."""
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.lost: list[str] = []
        """Texts so far that did not come back as they were."""
        self._lengths: dict[int, int] = {}

    def count(self, conversations: Iterable[Conversation]) -> dict[str, Reencoded]:
        """Return counts by role, in the order in which roles appear."""
        total: dict[str, Reencoded] = {}
        for conversation in conversations:
            for role, counts in self._count(conversation).items():
                total[role] = total.get(role, Reencoded()) + counts
        return total

    def _count(self, conversation: Conversation) -> dict[str, Reencoded]:
        written = [unit for _, units in conversation for unit in units]
        text = decode(self.tokenizer, written)
        found = encode_text(self.tokenizer, text)
        if decode(self.tokenizer, found) != text:
            self.lost.append(text)
        tokens: dict[str, int] = {}
        for role, units in conversation:
            tokens[role] = tokens.get(role, 0) + sum(self.vocabulary.lengths(units))
        units_of, equal_of = dict.fromkeys(tokens, 0), dict.fromkeys(tokens, 0)
        roles = [role for role, _ in conversation]
        if found == written:
            for role, units in conversation:
                units_of[role] += len(units)
                equal_of[role] += len(units)
        else:
            # A unit is the same if the same text has become it; it belongs to the turn that its
            # first character stands in.
            ends = list(accumulate(sum(map(self._length, units)) for _, units in conversation))
            known = set(self._placed(written))
            for place in self._placed(found):
                role = roles[min(bisect_right(ends, place[0]), len(roles) - 1)]
                units_of[role] += 1
                equal_of[role] += place in known
        return {
            role: Reencoded(tokens=tokens[role], units=units_of[role], equal=equal_of[role])
            for role in tokens
        }

    def _placed(self, units: Sequence[int]) -> list[tuple[int, int, int]]:
        """Return start, end and name of each unit; places are in characters."""
        edges = list(accumulate(map(self._length, units), initial=0))
        return [(*place, unit) for place, unit in zip(pairwise(edges), units, strict=True)]

    def _length(self, unit: int) -> int:
        if unit not in self._lengths:
            self._lengths[unit] = len(decode(self.tokenizer, [unit]))
        return self._lengths[unit]


def conversation_of(trajectory: Trajectory, vocabulary: LatentVocabulary) -> Conversation:
    """Return an episode as its ids encode: what a student that uses every latent would write."""
    return [
        (span.role, vocabulary.encode(trajectory.token_ids[span.start : span.end]))
        for span in trajectory.spans
    ]


def sum_of(counts: Mapping[str, Reencoded], *, is_prompt: bool | None = None) -> Reencoded:
    """Add up roles: all of them, what the model did not write, or what it wrote."""
    chosen = (
        each for role, each in counts.items() if is_prompt is None or (role != ACTION) == is_prompt
    )
    return sum(chosen, Reencoded())
