"""Text, ids and units.

Rendering chats with roles, and the tokenizer that knows the latent vocabulary.

A latent becomes an ordinary added token whose content is its segment's own text: encoding a
transcript then yields latents, and decoding yields plain text, in every engine that reads a
Hugging Face checkpoint (algorithm 3).
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from lar_lightning.base_models import tokenizer_fingerprint
from lar_lightning.errors import SettingError
from lar_lightning.segments import LatentVocabulary
from lar_lightning.trajectories import Span, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = Sequence[Mapping[str, str]]


def render_chat(
    tokenizer: "PreTrainedTokenizerFast", messages: Messages
) -> tuple[list[int], tuple[Span, ...]]:
    """Render messages up to where the assistant is to write.

    Returns:
        The token ids, and one span a message; what the template adds before, between and after the
        messages counts to the message that it introduces.
    """
    text = render_text(tokenizer, messages)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoding["input_ids"]  # type: ignore[assignment]
    starts: list[int] = [start for start, _ in encoding["offset_mapping"]]  # type: ignore[misc]
    spans: list[Span] = []
    position = 0
    for index, message in enumerate(messages):
        is_last = index == len(messages) - 1
        rendered = tokenizer.apply_chat_template(
            [dict(shown) for shown in messages[: index + 1]], tokenize=False
        )
        end = len(ids) if is_last else sum(start < len(rendered) for start in starts)
        if end > position:
            role = message["role"] if message["role"] != "assistant" else "history"
            spans.append(Span(role=role, start=position, end=end))
            position = end
    return ids, tuple(spans)


def render_text(tokenizer: "PreTrainedTokenizerFast", messages: Messages) -> str:
    """Render messages up to where the assistant is to write, as text.

    Templates with a thinking mode of their own (Qwen3) are told to leave it off: methods ask for
    thoughts in the prompt, alike for all models.
    """
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert isinstance(text, str)
    return text


def extend_tokenizer(
    tokenizer: "PreTrainedTokenizerFast", vocabulary: LatentVocabulary
) -> "PreTrainedTokenizerFast":
    """Return a copy of a base tokenizer that also knows the latents, under the vocabulary's ids.

    Raises:
        SettingError: if the vocabulary was mined with another tokenizer, or two latents have the
        same text.
    """
    from tokenizers import AddedToken

    check_tokenizer(tokenizer, vocabulary)
    check_distinct(vocabulary)
    extended = deepcopy(tokenizer)
    contents: list[Any] = [
        AddedToken(
            latent.text,
            normalized=False,
            special=False,
            lstrip=False,
            rstrip=False,
            single_word=False,
        )
        for latent in vocabulary.latents
    ]
    num_added = extended.add_tokens(contents)
    assert num_added == len(vocabulary), (
        "a latent's text is a token of the base vocabulary; mining rejects those"
    )
    return extended


def check_tokenizer(tokenizer: "PreTrainedTokenizerFast", vocabulary: LatentVocabulary) -> None:
    """Refuse a vocabulary that was mined with another tokenizer."""
    found = tokenizer_fingerprint(tokenizer)
    if vocabulary.base_size != len(tokenizer) or vocabulary.tokenizer_fingerprint not in (
        "",
        found,
    ):
        raise SettingError(
            "the latent vocabulary must be mined with the tokenizer of `base_model`, got one of "
            f"{vocabulary.base_size} tokens ({vocabulary.tokenizer_fingerprint}) for a tokenizer "
            f"of {len(tokenizer)} "
            f"({found}). Mine again with this `base_model`, or choose the other one."
        )


def check_distinct(vocabulary: LatentVocabulary) -> None:
    """Refuse latents that text cannot tell apart."""
    first: dict[str, int] = {}
    for index, latent in enumerate(vocabulary.latents):
        other = first.setdefault(latent.text, index)
        if other != index:
            raise SettingError(
                "the texts of a latent vocabulary must be distinct, since text is all that a "
                f"tokenizer sees, got {latent.text!r} for latents {other} and {index}. Mine again."
            )


def check_texts(tokenizer: "PreTrainedTokenizerFast", vocabulary: LatentVocabulary) -> None:
    """Refuse a vocabulary that a base tokenizer cannot be extended by.

    Raises:
        SettingError: if it belongs to another tokenizer, two latents have the same text, or a text
        is not that of its segment or is a token already.
    """
    check_tokenizer(tokenizer, vocabulary)
    check_distinct(vocabulary)
    known = tokenizer.get_vocab()
    for index, latent in enumerate(vocabulary.latents):
        text = decode(tokenizer, latent.segment)
        if text != latent.text or text in known:
            reason = f"whose segment reads {text!r}" if text != latent.text else "a token already"
            raise SettingError(
                "a latent's text must be that of its segment and no token of `base_model`, got "
                f"{latent.text!r} for latent {index}, {reason}. Mine again."
            )


def check_tokens(tokenizer: "PreTrainedTokenizerFast", trajectories: Iterable[Trajectory]) -> None:
    """Refuse trajectories whose tokens are not a tokenizer's."""
    for trajectory in trajectories:
        least, most = trajectory.token_ids.min(), trajectory.token_ids.max()
        if least < 0 or most >= len(tokenizer):
            raise SettingError(
                f"trajectories must be of the {len(tokenizer)} tokens of `base_model`, got token "
                f"{least if least < 0 else most} in {trajectory.trajectory_id}. Choose the "
                "`base_model` that they were made for, or another `run_dir`."
            )


def decode(
    tokenizer: "PreTrainedTokenizerFast", ids: Iterable[int], *, skip_special_tokens: bool = False
) -> str:
    """Decode without the clean-up of spaces, which is not invertible."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def encode_text(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Encode text as it stands, with special tokens recognised but none added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    return ids
