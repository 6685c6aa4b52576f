"""The latents of a run with their use and examples, as the page's browser shows them."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lar_lightning.agents.episode import Episode
from lar_lightning.errors import SettingError
from lar_lightning.evaluation.examples import Piece
from lar_lightning.segments import LatentAction, LatentVocabulary

CONTEXT = 60
"""Characters on either side of an example."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """A latent in its context."""

    where: str
    before: str
    text: str
    after: str


MOST_USES = 3
"""Examples of a latent."""


@dataclass(frozen=True, kw_only=True)
class BrowsedLatent:
    """One row of the browser."""

    index: int
    latent: LatentAction
    emitted: int
    """Times that LAR wrote it on held-out tasks."""
    places: int
    """Times that encoding the same texts would."""
    counts: Mapping[str, float]
    """Of `latent_usage.csv`."""
    uses: tuple[Use, ...]


def browsed_latents(
    vocabulary: LatentVocabulary,
    episodes: Iterable[Episode],
    emitted: Counter[int],
    usage: Mapping[int, Mapping[str, float]],
    uses: Sequence[Mapping[int, Use]],
) -> list[BrowsedLatent]:
    """Return the latents, those most used first.

    Args:
        vocabulary: Of the run.
        episodes: That LAR has played.
        emitted: Latents in them, by index.
        usage: Of `latent_usage.csv`, by index.
        uses: Of each text, by index; the first of a latent are kept.
    """
    places = count_latents(
        vocabulary,
        (vocabulary.encode(vocabulary.expand(episode.units)) for episode in episodes),
    )
    table = [
        BrowsedLatent(
            index=index,
            latent=latent,
            emitted=emitted[index],
            places=places[index],
            counts=usage.get(index, {}),
            uses=tuple(found[index] for found in uses if index in found)[:MOST_USES],
        )
        for index, latent in enumerate(vocabulary.latents)
    ]
    return sorted(table, key=lambda row: (-row.emitted, -row.latent.num_occurrences))


def count_latents(vocabulary: LatentVocabulary, texts: Iterable[Sequence[int]]) -> Counter[int]:
    """Count the units that are latents, by index.

    Raises:
        SettingError: if a unit is beyond the vocabulary.
    """
    counts = Counter(
        unit - vocabulary.base_size
        for units in texts
        for unit in units
        if vocabulary.is_latent(unit)
    )
    if counts and max(counts) >= len(vocabulary):
        raise SettingError(
            "`run_dir` must hold an evaluation of its own latent vocabulary, got latent "
            f"{max(counts)} where there are {len(vocabulary)}. Run the verb `evaluate` again."
        )
    return counts


def mined_uses(path: Path, vocabulary: LatentVocabulary) -> dict[int, Use]:
    """Read an example of each latent from `mining_report.json`; empty where there is none."""
    try:
        described: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["latents"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    uses: dict[int, Use] = {}
    for entry in described:
        index = entry.get("id", -1) - vocabulary.base_size
        example = entry.get("example") or ("", "", "")
        if 0 <= index < len(vocabulary) and vocabulary.latents[index].text == entry.get("text"):
            before, text, after = example
            if text:
                uses[index] = Use(where="mined", before=before, text=text, after=after)
    return uses


def written_uses(
    vocabulary: LatentVocabulary, where: str, pieces: Sequence[Piece]
) -> dict[int, Use]:
    """Return the first use of each latent in a text that the student wrote."""
    by_text = {latent.text: index for index, latent in enumerate(vocabulary.latents)}
    texts = [piece.text for piece in pieces]
    starts = [0]
    for text in texts:
        starts.append(starts[-1] + len(text))
    whole = "".join(texts)
    uses: dict[int, Use] = {}
    for piece, (start, end) in zip(pieces, pairwise(starts), strict=True):
        index = by_text.get(piece.text) if piece.kind == "latent" else None
        if index is not None and index not in uses:
            uses[index] = Use(
                where=where,
                before=whole[max(start - CONTEXT, 0) : start],
                text=piece.text,
                after=whole[end : end + CONTEXT],
            )
    return uses
