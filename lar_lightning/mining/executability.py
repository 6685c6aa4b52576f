"""Which segments may be one decision.

Certain inside, free of parameters, and stable as text (paper 3.4).

Dimensions: N tokens of the corpus.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from lar_lightning.mining.corpus import Corpus
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tokenizer import decode, encode_text, extend_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character."""


def binding_tokens(
    tokenizer: "PreTrainedTokenizerFast", tokens: Int[np.ndarray, " N"]
) -> Bool[np.ndarray, " N"]:
    """Mark tokens that no segment may contain: digits bind parameters, special tokens end turns."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    kinds, inverse = np.unique(tokens, return_inverse=True)
    texts = [decode(tokenizer, [int(token)]) for token in kinds]
    is_binding = [
        int(token) in special or REPLACEMENT in text or any(letter.isdigit() for letter in text)
        for token, text in zip(kinds, texts, strict=True)
    ]
    return np.asarray(is_binding, dtype=bool)[inverse]


def uncertain_positions(corpus: Corpus, max_entropy: float) -> Bool[np.ndarray, " N"]:
    """Mark tokens that were a decision: the policy's entropy there exceeds `max_entropy` nats."""
    return corpus.entropies > max_entropy


def certain_share(
    uncertain_before: Int[np.ndarray, " N1"], positions: Int[np.ndarray, " P"], length: int
) -> float:
    """Return the share of occurrences without an uncertain token after the first.

    Args:
        uncertain_before: Number of uncertain tokens before each position (one entry more than
            tokens).
        positions: Where the segment occurs.
        length: Of the segment, in tokens.
    """
    num_uncertain = uncertain_before[positions + length] - uncertain_before[positions + 1]
    return float((num_uncertain == 0).mean()) if len(positions) else 0.0


def is_stable_alone(
    tokenizer: "PreTrainedTokenizerFast", segment: Sequence[int], text: str
) -> bool:
    """Tell whether a segment's text is tokenized to the segment and decodes as one token.

    Byte-level decoders read an added token without space or newline letter by letter as bytes,
    where they can: latin letters with accents come out broken. It is looked at in second place,
    since some decoders strip the first.
    """
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is not None and decoder.decode([text, text]) != decoder.decode([text]) + text:
        return False
    if not text or REPLACEMENT in text or text in tokenizer.get_vocab():
        return False
    return encode_text(tokenizer, text) == list(segment)


class TextCorpus:
    """All texts as one, with token edges, to find a segment's text wherever it stands."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> None:
        """Tokenize `texts` with the base tokenizer."""
        self.text = "\0".join(texts)
        self.token_at = np.full(len(self.text) + 2, -1, dtype=np.int64)
        offset, index = 0, 0
        for text in texts:
            encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            for start, _ in encoding["offset_mapping"]:  # type: ignore[union-attr]
                if self.token_at[offset + start] < 0:  # type: ignore[operator]
                    # several tokens of one character all start with it; its first is the edge
                    self.token_at[offset + start] = index  # type: ignore[operator]
                index += 1
            offset += len(text)
            self.token_at[offset] = index  # the end of a text is an edge too
            index += 1
            offset += 1

    def misaligned_share(self, text: str, length: int) -> float:
        """Return the share of places of `text` where it is not `length` whole tokens.

        There the extended tokenizer would match although the ids are others.
        """
        num_places, num_misaligned = 0, 0
        start = self.text.find(text)
        while start >= 0:
            first, end = self.token_at[start], self.token_at[start + len(text)]
            num_places += 1
            num_misaligned += not (first >= 0 and end - first == length)
            start = self.text.find(text, start + 1)
        return num_misaligned / num_places if num_places else 0.0


def tokenizer_differences(
    tokenizer: "PreTrainedTokenizerFast", vocabulary: LatentVocabulary, texts: Sequence[str]
) -> tuple[int, int, Counter[int]]:
    """Compare the code of base ids with what the extended tokenizer makes of the same text.

    Returns:
        The number of units that are only in one of the two, the number of units compared, and how
        often each latent stands in or beside a difference, by unit id.
    """
    extended = extend_tokenizer(tokenizer, vocabulary)
    num_different, num_units = 0, 0
    guilty: Counter[int] = Counter()
    for text in texts:
        by_ids = vocabulary.encode(encode_text(tokenizer, text))
        by_text = encode_text(extended, text)
        num_units += len(by_ids)
        if by_ids != by_text:
            different, latents = _parting(vocabulary, tokenizer, by_ids, by_text)
            num_different += different
            guilty.update(latents)
    return num_different, num_units, guilty


def _parting(
    vocabulary: LatentVocabulary,
    tokenizer: "PreTrainedTokenizerFast",
    left: list[int],
    right: list[int],
) -> tuple[int, set[int]]:
    """Count units of `right` that `left` cuts otherwise, and name latents in or beside them."""

    def edges(units: list[int]) -> list[int]:
        lengths = [len(decode(tokenizer, vocabulary.expand([unit]))) for unit in units]
        return np.cumsum([0, *lengths]).tolist()

    left_edges, right_edges = edges(left), edges(right)
    left_spans = {
        (start, end, unit)
        for start, end, unit in zip(left_edges, left_edges[1:], left, strict=False)
    }
    differing = [
        index
        for index, unit in enumerate(right)
        if (right_edges[index], right_edges[index + 1], unit) not in left_spans
    ]
    near = {
        right[other]
        for index in differing
        for other in (index - 1, index, index + 1)
        if 0 <= other < len(right)
    }
    return len(differing), {unit for unit in near if vocabulary.is_latent(unit)}
