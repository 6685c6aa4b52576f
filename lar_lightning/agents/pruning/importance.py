"""How important each word of a text is, as two kinds of model see it.

LLMLingua-2 (Pan et al. 2024) is a token classifier that was trained on what a large model keeps of
meeting transcripts: the probability of the label "keep". Self-information is the policy's own
surprisal of each token after what it read, -log p; it needs no other model, and is a stand-in for
machines where the classifier cannot be had, not the published method.

Dimensions: B texts, T tokens.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lar_lightning.agents.pruning.words import Word, window_bounds, words_of
from lar_lightning.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LLMLINGUA_2 = "llmlingua-2"
LLMLINGUA_2_MODEL = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"
SELF_INFORMATION = "self-information"

T = TypeVar("T")

KEEP_LABEL = 1
TOKENS_PER_BATCH = 8192
LOGITS_PER_CHUNK = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text whose words are to be scored."""

    text: str
    context_ids: tuple[int, ...]
    """What the policy had read and written before it."""


Importance = Callable[[Sequence[Passage]], list[list[Word]]]


def check_importance(importance: str) -> None:
    """Refuse a classifier that cannot be had, before long work.

    Raises:
        SettingError: if there is no such model, or it is no classifier of tokens into two.
    """
    if importance == SELF_INFORMATION:
        return
    from transformers import AutoConfig

    name = _model_name(importance)
    with _explained(importance):
        config = AutoConfig.from_pretrained(name)
    if config.num_labels != 2:
        raise SettingError(
            f"`importance` must be a classifier of tokens with the 2 labels drop and keep, got "
            f"{name!r} with {config.num_labels}. Take {LLMLINGUA_2!r}, or {SELF_INFORMATION!r}."
        )


@contextmanager
def open_importance(
    importance: str, policy: Path, tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[Importance]:
    """Load what scores words, and free it afterwards.

    Args:
        importance: `llmlingua-2`, the name or folder of another such classifier, or
            `self-information`.
        policy: Checkpoint of the policy.
        tokenizer: Of the policy.
    """
    import torch

    scorer: TokenClassifier | SelfInformation
    if importance == SELF_INFORMATION:
        from lar_lightning.models.scoring import load_scorer

        scorer = SelfInformation(load_scorer(policy), tokenizer)
    else:
        from transformers import AutoModelForTokenClassification, AutoTokenizer

        name = _model_name(importance)
        with _explained(importance):
            model: Any = AutoModelForTokenClassification.from_pretrained(name)
            scorer = TokenClassifier(model, AutoTokenizer.from_pretrained(name))
        model.eval()
        if torch.cuda.is_available():
            model.cuda()
        del model
    try:
        yield scorer
    finally:
        scorer.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class TokenClassifier:
    """Probability of the label "keep" of LLMLingua-2 and its kind, which read the text alone."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Wrap a loaded classifier in evaluation mode."""
        self.model = model
        self.tokenizer = tokenizer
        # RoBERTa counts positions from behind the padding id: two of its 514 are never used.
        self.window = min(512, model.config.max_position_embeddings - 2) - 2

    def __call__(self, passages: Sequence[Passage]) -> list[list[Word]]:
        """Score the words of each text."""
        spans: list[list[tuple[int, int]]] = []
        windows: list[tuple[int, int, list[int]]] = []
        for index, passage in enumerate(passages):
            encoding = self.tokenizer(
                passage.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            spans.append(encoding["offset_mapping"])
            ids = encoding["input_ids"]
            pieces = [passage.text[start:end].strip() for start, end in spans[-1]]
            windows += [(index, a, ids[a:b]) for a, b in window_bounds(pieces, self.window)]
        scores = [[0.0] * len(places) for places in spans]
        for batch in in_batches(windows, [len(ids) + 2 for *_, ids in windows], "importance"):
            for (index, first, ids), row in zip(batch, self._read(batch), strict=True):
                scores[index][first : first + len(ids)] = row[1 : len(ids) + 1]
        return [
            words_of(passage.text, [(*span, s) for span, s in zip(places, row, strict=True)])
            for passage, places, row in zip(passages, spans, scores, strict=True)
        ]

    def _read(self, batch: Sequence[tuple[int, int, list[int]]]) -> list[list[float]]:
        import torch

        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        ids, mask = _padded([[first, *ids, last] for *_, ids in batch], self.tokenizer.pad_token_id)
        with torch.inference_mode():
            device = self.model.device
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return logits.float().softmax(-1)[..., KEEP_LABEL].tolist()


class SelfInformation:
    """The policy's surprisal of each token, in nats, after what it read and wrote before."""

    def __init__(self, model: Any, tokenizer: "PreTrainedTokenizerFast") -> None:
        """Wrap a loaded policy in evaluation mode."""
        self.model = model
        self.tokenizer = tokenizer

    def __call__(self, passages: Sequence[Passage]) -> list[list[Word]]:
        """Score the words of each text."""
        encodings: list[Any] = [
            self.tokenizer(passage.text, add_special_tokens=False, return_offsets_mapping=True)
            for passage in passages
        ]
        jobs = [
            (index, [*passage.context_ids, *encoding["input_ids"]], len(passage.context_ids))
            for index, (passage, encoding) in enumerate(zip(passages, encodings, strict=True))
            if encoding["input_ids"]
        ]
        scores: list[list[float]] = [[] for _ in passages]
        for batch in in_batches(jobs, [len(ids) for _, ids, _ in jobs], "importance"):
            for (index, *_), row in zip(batch, self._read(batch), strict=True):
                scores[index] = row
        return [
            words_of(
                passage.text,
                [(*span, s) for span, s in zip(encoding["offset_mapping"], row, strict=True)],
            )
            for passage, encoding, row in zip(passages, encodings, scores, strict=True)
        ]

    def _read(self, batch: Sequence[tuple[int, list[int], int]]) -> list[list[float]]:
        import torch
        from torch.nn.functional import cross_entropy

        sequences = [ids for _, ids, _ in batch]
        ids, mask = _padded(sequences, 0)
        head = self.model.get_output_embeddings()
        device = self.model.device
        rows_per_chunk = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
        with torch.inference_mode():
            backbone = getattr(self.model, self.model.base_model_prefix)
            hidden = backbone(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).last_hidden_state
            read: list[list[float]] = []
            for row, (_, sequence, start) in enumerate(batch):
                states = hidden[row, start - 1 : len(sequence) - 1].split(rows_per_chunk)
                targets = ids[row, start : len(sequence)].to(device).split(rows_per_chunk)
                parts = [
                    cross_entropy(head(part).float(), target, reduction="none")
                    for part, target in zip(states, targets, strict=True)
                ]
                read.append(torch.cat(parts).tolist())
        return read


def in_batches(items: Sequence[T], lengths: Sequence[int], label: str) -> Iterator[list[T]]:
    """Yield items of like length together, the longest first, with a progress bar."""
    from tqdm import tqdm

    order = sorted(range(len(items)), key=lambda index: lengths[index], reverse=True)
    with tqdm(total=len(items), desc=label, unit="text", mininterval=1.0) as progress:
        while order:
            size = max(1, TOKENS_PER_BATCH // max(1, lengths[order[0]]))
            batch, order = order[:size], order[size:]
            yield [items[index] for index in batch]
            progress.update(len(batch))


def _padded(sequences: Sequence[Sequence[int]], padding: int) -> tuple[Any, Any]:
    import torch

    ids = torch.full((len(sequences), max(map(len, sequences))), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def _model_name(importance: str) -> str:
    return LLMLINGUA_2_MODEL if importance == LLMLINGUA_2 else importance


@contextmanager
def _explained(importance: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingError(
            f"`importance` must be {LLMLINGUA_2!r}, the name or folder of such a classifier, or "
            f"{SELF_INFORMATION!r}, got {importance!r}, which cannot be loaded ({reason}). "
            f"Download {LLMLINGUA_2_MODEL} and give its folder, or take {SELF_INFORMATION!r}, a "
            "stand-in that needs no other model."
        ) from error
