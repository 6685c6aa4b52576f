"""What a client sends back as text, and the units that it is read as."""

from typing import TYPE_CHECKING

import numpy as np
import pytest

from lar_lightning.export.reencoding import Reencoded, Reencoder, conversation_of, sum_of
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.tokenizer import encode_text, extend_tokenizer
from lar_lightning.trajectories import ACTION, NO_ENTROPY, Span, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = (" return result\n", " for letter in")


@pytest.fixture
def vocabulary(tiny_tokenizer: "PreTrainedTokenizerFast") -> LatentVocabulary:
    latents = [
        LatentAction(segment=tuple(encode_text(tiny_tokenizer, text)), text=text) for text in TEXTS
    ]
    return LatentVocabulary(latents, base_size=len(tiny_tokenizer))


@pytest.fixture
def reencoder(tiny_tokenizer: "PreTrainedTokenizerFast", vocabulary: LatentVocabulary) -> Reencoder:
    return Reencoder(extend_tokenizer(tiny_tokenizer, vocabulary), vocabulary)


def test_text_of_ids_comes_back_as_their_units_and_tells_what_is_saved(
    tiny_tokenizer: "PreTrainedTokenizerFast", vocabulary: LatentVocabulary, reencoder: Reencoder
) -> None:
    parts = [("system", "You use for letter in strings."), (ACTION, "x return result\nx")]
    ids = [encode_text(tiny_tokenizer, text) for _, text in parts]
    edges = np.cumsum([0, *map(len, ids)]).tolist()
    trajectory = Trajectory(
        trajectory_id="1",
        task_id="1",
        token_ids=np.asarray([token for part in ids for token in part], dtype=np.int32),
        spans=tuple(
            Span(role=role, start=start, end=end)
            for (role, _), start, end in zip(parts, edges, edges[1:], strict=False)
        ),
        entropies=np.full(edges[-1], np.nan, dtype=np.float32),
        entropy_kind=NO_ENTROPY,
        temperature=None,
        is_finished=True,
    )
    counts = reencoder.count([conversation_of(trajectory, vocabulary)] * 3)
    for (role, _), part, segment in zip(parts, ids, vocabulary.segments[::-1], strict=True):
        units = len(part) - len(segment) + 1
        assert counts[role] == Reencoded(tokens=3 * len(part), units=3 * units, equal=3 * units)
    assert sum_of(counts, is_prompt=True) == counts["system"]
    assert sum_of(counts, is_prompt=False) == counts[ACTION]
    assert sum_of(counts) == counts["system"] + counts[ACTION]
    assert reencoder.lost == []


def test_a_latent_that_was_written_out_comes_back_as_the_latent_and_is_counted(
    vocabulary: LatentVocabulary, reencoder: Reencoder
) -> None:
    """A model that does not use a latent finds it in its history all the same."""
    latent = vocabulary.base_size
    segment = list(vocabulary.segments[0])
    counts = reencoder.count([[(ACTION, [5, *segment, 6, latent, 7])]])[ACTION]
    assert counts.tokens == 3 + 2 * len(segment)
    assert counts.units == 5
    assert counts.equal == 4
    assert counts.equal_share == 0.8
    assert counts.saving == pytest.approx(1 - 5 / counts.tokens)


def test_a_latent_across_two_turns_belongs_to_the_first(
    tiny_tokenizer: "PreTrainedTokenizerFast", vocabulary: LatentVocabulary, reencoder: Reencoder
) -> None:
    first, second = (encode_text(tiny_tokenizer, text) for text in ("x for letter", " in y"))
    counts = reencoder.count([[("user", first), (ACTION, second)]])
    assert counts["user"].equal == counts["user"].units - 1
    assert counts["user"].units + counts[ACTION].units < len(first) + len(second)
    assert counts[ACTION].equal == counts[ACTION].units == len(encode_text(tiny_tokenizer, " y"))


def test_nothing_is_whole() -> None:
    assert (Reencoded().equal_share, Reencoded().saving) == (1.0, 0.0)
