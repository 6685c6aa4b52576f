"""The latent vocabulary Z (paper 3.2): symbols that stand for segments of base tokens.

`encode` maps base ids to *units* (a base id or a latent id), `expand` maps units back.
`expand(encode(x)) == x` and `len(encode(x)) <= len(x)` hold for every sequence of base ids. Latent
k has id `base_size + k`, which is the id that the extended tokenizer gives to the same segment.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lar_lightning.artefacts import write_json
from lar_lightning.automaton import build_automaton
from lar_lightning.errors import SettingError

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class LatentAction:
    """One symbol: its canonical segment and what mining found out about it."""

    segment: tuple[int, ...]
    """Base token ids, at least two."""
    text: str
    """What the segment decodes to, and what the exported tokenizer matches."""
    rank: int = 0
    """Place among the picks: 0 saves most beside all others."""
    num_occurrences: int = 0
    """Places that it takes in what was mined, beside all others."""
    support: int = 0
    """Distinct tasks with such a place."""
    inner_entropy: float | None = None
    """Mean nats per token after the first, over those places; None where it is not known."""
    realizations: tuple[tuple[int, ...], ...] = ()
    """Other segments that it stands for: written as the canonical one before training."""


@dataclass
class TrieNode:
    """A prefix of some segments."""

    children: dict[int, "TrieNode"] = field(default_factory=dict)
    latent: int | None = None
    """Index of the latent whose segment ends here."""


class LatentVocabulary:
    """Latent actions over the base vocabulary of one tokenizer."""

    def __init__(
        self,
        latents: Sequence[LatentAction],
        *,
        base_size: int,
        tokenizer_fingerprint: str = "",
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """Build the vocabulary.

        Args:
            latents: In the order of their ids.
            base_size: Length of the base tokenizer; the first latent has this id.
            tokenizer_fingerprint: Identifies the base tokenizer.
            provenance: Settings that mined it, kept for reuse and reports.
        """
        segments = [latent.segment for latent in latents]
        if len(set(segments)) != len(segments):
            raise ValueError("segments of a latent vocabulary must be distinct.")
        for segment in segments:
            if len(segment) < 2 or not all(0 <= token < base_size for token in segment):
                raise ValueError(
                    f"a segment must be two or more base ids below {base_size}, got {segment}."
                )
        self.latents = tuple(latents)
        self.base_size = base_size
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.provenance = dict(provenance or {})
        self.trie = build_trie(segments)
        self.automaton = build_automaton(segments, base_size)
        self.longest = max(map(len, segments), default=0)

    def __len__(self) -> int:
        return len(self.latents)

    def first(self, num_latents: int) -> "LatentVocabulary":
        """Return the vocabulary of the first latents; their ids stay what they are."""
        return LatentVocabulary(
            self.latents[:num_latents],
            base_size=self.base_size,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            provenance=self.provenance,
        )

    @property
    def classes(self) -> dict[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Other realizations by canonical segment, where a latent stands for several."""
        return {
            latent.segment: latent.realizations for latent in self.latents if latent.realizations
        }

    @property
    def segments(self) -> tuple[tuple[int, ...], ...]:
        """Base ids of each latent, in the order of their ids."""
        return tuple(latent.segment for latent in self.latents)

    def is_latent(self, unit: int) -> bool:
        """Tell whether a unit is a latent action."""
        return unit >= self.base_size

    def encode(self, ids: Iterable[int]) -> list[int]:
        """Return the units of `ids` by leftmost-longest match.

        Raises:
            ValueError: if an id is not one of the base vocabulary.
        """
        tokens = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.base_size):
            raise ValueError(
                f"ids must lie in 0..{self.base_size - 1}, got {tokens.min()}..{tokens.max()}."
            )
        return self.automaton.encode(tokens).tolist()

    def expand(self, units: Iterable[int]) -> list[int]:
        """Return the base ids of `units`.

        Raises:
            ValueError: if a unit is neither a base id nor a latent.
        """
        array = np.asarray(units if isinstance(units, np.ndarray) else list(units), dtype=np.int64)
        if array.size and not (array.min() >= 0 and array.max() < self.base_size + len(self)):
            raise ValueError(
                f"units must lie in 0..{self.base_size + len(self) - 1}, got "
                f"{array.min()}..{array.max()}."
            )
        return self.automaton.expand(array).tolist()

    def lengths(self, units: Iterable[int]) -> list[int]:
        """Return the number of base tokens of each unit."""
        return [
            len(self.latents[unit - self.base_size].segment) if unit >= self.base_size else 1
            for unit in units
        ]

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON, whole or not at all."""
        content = {
            "schema": SCHEMA,
            "base_size": self.base_size,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "provenance": self.provenance,
            "latents": [asdict(latent) for latent in self.latents],
        }
        write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> "LatentVocabulary":
        """Read a vocabulary.

        Raises:
            SettingError: if there is none at `path`, or it is not one.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "latent_vocabulary.json"
        if not path.exists():
            raise SettingError(
                f"there must be a latent vocabulary at {path}, got no file. Run the verb `mine` "
                "first."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise SettingError(
                    f"{path} must have schema {SCHEMA}, got {content['schema']!r}. Mine again."
                )
            latents = [
                LatentAction(
                    **{
                        **latent,
                        "segment": tuple(latent["segment"]),
                        "realizations": tuple(map(tuple, latent["realizations"])),
                    }
                )
                for latent in content["latents"]
            ]
            return cls(
                latents,
                base_size=content["base_size"],
                tokenizer_fingerprint=content["tokenizer_fingerprint"],
                provenance=content["provenance"],
            )
        except SettingError:
            raise
        except (ValueError, LookupError, TypeError) as error:
            raise SettingError(
                f"{path} must be a latent vocabulary, got something else ({error!r}). Mine again."
            ) from error


def build_trie(segments: Iterable[Sequence[int]]) -> TrieNode:
    """Return the trie of all segments; a node that ends one holds its index."""
    root = TrieNode()
    for index, segment in enumerate(segments):
        node = root
        for token in segment:
            node = node.children.setdefault(token, TrieNode())
        node.latent = index
    return root
