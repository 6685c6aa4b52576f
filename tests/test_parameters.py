import gzip
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lar_lightning.mining.parameters import (
    Parameters,
    binding_tokens,
    find_parameters,
    pattern_matches,
    texts_of_kinds,
)
from lar_lightning.settings.parameter_patterns import PARAMETER_PATTERNS
from lar_lightning.tokenizer import decode, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TAU_BENCH = Path(__file__).parents[2] / "shared" / "data" / "tau_bench"
NAMES = ("alpha", "bravo", "carol", "delta", "erika", "felix", "grace", "helen", "ivory", "julia")

Action = tuple[int, str]


def parameters_of(
    tokenizer: "PreTrainedTokenizerFast",
    actions: Sequence[Action],
    *,
    patterns: Sequence[str] = (),
    min_values: int = 4,
    max_share: float = 0.3,
) -> tuple[Parameters, list[list[int]]]:
    """Return what is found in actions of (task number, text), and the ids of each action."""
    ids = [encode_text(tokenizer, text) for _, text in actions]
    lengths = [len(action) for action in ids]
    starts = np.zeros(sum(lengths), dtype=bool)
    starts[np.cumsum([0, *lengths[:-1]])] = True
    found = find_parameters(
        tokenizer,
        np.concatenate([np.asarray(action, dtype=np.int64) for action in ids]),
        np.repeat([task for task, _ in actions], lengths),
        starts,
        patterns=patterns,
        min_values=min_values,
        max_share=max_share,
    )
    return found, ids


def marked_texts(
    tokenizer: "PreTrainedTokenizerFast", mask: np.ndarray, ids: Sequence[Sequence[int]]
) -> list[str]:
    """Return each action with its marked runs in braces of their own."""
    shown, at = [], 0
    for action in ids:
        runs, before = "", False
        for token, is_marked in zip(action, mask[at : at + len(action)].tolist(), strict=True):
            runs += "" if is_marked == before else "<<" if is_marked else ">>"
            runs += decode(tokenizer, [token])
            before = is_marked
        shown.append(runs + (">>" if before else ""))
        at += len(action)
    return shown


def slots_shown(
    tokenizer: "PreTrainedTokenizerFast", actions: Sequence[Action], **options: float
) -> list[str]:
    found, ids = parameters_of(tokenizer, actions, **options)  # type: ignore[arg-type]
    return marked_texts(tokenizer, found.slots, ids)


def test_digits_special_tokens_and_broken_bytes_bind(
    tiny_tokenizer: "PreTrainedTokenizerFast",
) -> None:
    ids = encode_text(tiny_tokenizer, "return \u00b2 7<|im_end|> \U0001f642")
    is_binding = binding_tokens(tiny_tokenizer, np.asarray(ids))
    texts = texts_of_kinds(tiny_tokenizer, np.asarray(ids))
    unbound = [text for text, binds in zip(texts, is_binding, strict=True) if not binds]
    assert "".join(unbound).split() == ["return"]
    assert is_binding.sum() >= 6  # a digit, a square, an end, and four bytes of a face


TEMPLATES = [
    '{{"name": "total", "arguments": {{"letter": "{}"}}}}',
    '{{\\"letter\\": \\"{}\\"}}',
    "search[{}]",
    "search[{}?]\n",
    "<search> {} </search> and",
    "<search>{}</search>",
    "open the `{}` function",
    "where name = '{}' and",
    "total({})",
    "--letter={} numbers",
    'numbers = ["{}"]',
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_values_of_a_slot_are_marked_and_its_frame_is_not(
    tiny_tokenizer: "PreTrainedTokenizerFast", template: str
) -> None:
    shown = slots_shown(
        tiny_tokenizer, [(task, template.format(name)) for task, name in enumerate(NAMES)]
    )
    for text, name in zip(shown, NAMES, strict=True):
        # a word's space may be part of its token
        assert text.replace("<< ", " <<") == template.format(f"<<{name}>>")


def test_a_slot_may_lie_anywhere_in_an_action(tiny_tokenizer: "PreTrainedTokenizerFast") -> None:
    actions = [
        (task, f"The function returns {name}. Check search[{name} text] for the length.")
        for task, name in enumerate(NAMES)
    ]
    shown = slots_shown(tiny_tokenizer, actions)
    expected = [
        text.replace(f"[{name}", f"[<<{name}>>")
        for (_, text), name in zip(actions, NAMES, strict=True)
    ]
    assert shown == expected  # outside of delimiters nothing is marked, nor what all tasks write


PROSE = [
    "The {} is longest",
    "The function: {}\nreturns",
    "it isn't {} that's the result",
    "numbers (or {}) in the text",
    "the result > {} < the text",
]


@pytest.mark.parametrize("template", PROSE)
def test_words_in_prose_are_no_slots(
    tiny_tokenizer: "PreTrainedTokenizerFast", template: str
) -> None:
    actions = [(task, template.format(name)) for task, name in enumerate(NAMES)]
    assert not parameters_of(tiny_tokenizer, actions)[0].slots.any()


def test_long_contents_are_prose_and_no_evidence(
    tiny_tokenizer: "PreTrainedTokenizerFast",
) -> None:
    long = "the length of the text and the numbers of a list that returns the result of a function"
    actions = [(task, f'"message": "{name} {long}"') for task, name in enumerate(NAMES)]
    assert not parameters_of(tiny_tokenizer, actions)[0].slots.any()
    short = [(task, f'"message": "{name}"') for task, name in enumerate(NAMES)]
    shown = slots_shown(tiny_tokenizer, [*actions[:2], *short])
    assert shown[0].startswith('"message": "<<alpha')  # a slot known from others
    assert shown[0].endswith('"')


def test_names_of_slots_are_structure(tiny_tokenizer: "PreTrainedTokenizerFast") -> None:
    actions = [(task, f'{{"{name}": "text", \'{name}\': 0}}') for task, name in enumerate(NAMES)]
    assert not parameters_of(tiny_tokenizer, actions)[0].slots.any()


def test_words_of_many_tasks_are_structure(tiny_tokenizer: "PreTrainedTokenizerFast") -> None:
    """A tool that four of ten tasks call is kept; one that few call is a value."""
    tools = ["return_total"] * 4 + list(NAMES[:6])
    actions = [(task, f'{{"name": "{tool}"}}') for task, tool in enumerate(tools)]
    shown = slots_shown(tiny_tokenizer, actions, max_share=0.4)
    assert shown[:4] == ['{"name": "return_total"}'] * 4
    assert shown[4:] == [f'{{"name": "<<{name}>>"}}' for name in NAMES[:6]]
    shown = slots_shown(tiny_tokenizer, actions, max_share=0.5)
    assert shown[0] == '{"name": "<<return_total>>"}'


def test_parts_of_a_word_are_not_kept_alone(tiny_tokenizer: "PreTrainedTokenizerFast") -> None:
    """All values begin with the same token, but it is no word of its own."""
    words = [f"string{ending}" for ending in ("q", "w", "z", "k", "j", "x")]
    head = encode_text(tiny_tokenizer, words[0])[:-1]
    assert all(encode_text(tiny_tokenizer, word)[:-1] == head for word in words)
    shown = slots_shown(
        tiny_tokenizer, [(task, f"search[{word}]") for task, word in enumerate(words)]
    )
    assert shown == [f"search[<<{word}>>]" for word in words]


def test_one_task_alone_makes_no_slot(tiny_tokenizer: "PreTrainedTokenizerFast") -> None:
    """Repetition inside of one task is no alignment of trajectories."""
    actions = [(task % 2, f"search[{name}]") for task, name in enumerate(NAMES)]
    assert not parameters_of(tiny_tokenizer, actions)[0].slots.any()


def test_few_values_are_a_choice_and_no_slot(tiny_tokenizer: "PreTrainedTokenizerFast") -> None:
    actions = [(task, f"search[{NAMES[task % 3]}]") for task in range(12)]
    assert not parameters_of(tiny_tokenizer, actions)[0].slots.any()


LOOKS = [
    ("user mail is <<a.lopez@example.com>> and", "E-mail"),
    ("id <<123e4567-e89b-12d3-a456-426614174000>> now", "UUID"),
    ("goto[<<https://www.example.com/a?b=c#d>>]", "URL"),
    ("order <<#W2378156>>, please", "id with a number sign"),
    ("flight <<HAT170>> of <<M20IZO>>", "id of capitals and digits"),
    ('"<<mia_li_3668>>"', "id in small letters"),
    ("cat <</etc/passwd>> and <<src/main/java/Foo.java>> and <<./run.sh>>", "paths"),
    ("`<<TestCase.java>>` or <<pom.xml>>", "files"),
    ("on <<2024-05-28>> at <<2024-05-28T10:30>>", "dates"),
    ("</search> and/or 3/4 e.g. this. Or (that): return x / y  // no", "none of all"),
    ("def has_close_elements(numbers: List[float]) -> bool:", "code"),
]


@pytest.mark.parametrize(("marked", "_kind"), LOOKS, ids=[kind for _, kind in LOOKS])
def test_default_patterns_find_values_by_their_looks(marked: str, _kind: str) -> None:
    text = marked.replace("<<", "").replace(">>", "")
    covered = np.zeros(len(text) + 1, dtype=bool)
    for pattern in PARAMETER_PATTERNS:
        for match in re.finditer(pattern, text):
            covered[match.start() : match.end()] = True
    shown, before = "", False
    for letter, is_covered in zip(text + "\0", covered.tolist(), strict=True):
        shown += "" if is_covered == before else "<<" if is_covered else ">>"
        shown += letter
        before = is_covered
    assert shown == marked + "\0"


ALPHABET = "ab #/.@12\u00e9\U0001f642[]\n"


@settings(max_examples=150)
@given(
    texts=st.lists(st.text(ALPHABET, min_size=1, max_size=12), min_size=1, max_size=6),
    pattern=st.sampled_from(["a+", "b[ab]*", r"\d+", "#?1", "[^a]b", "", r"$", "\u00e9", r"^."]),
)
def test_tokens_are_marked_exactly_where_they_overlap_a_match(
    tiny_tokenizer: "PreTrainedTokenizerFast", texts: list[str], pattern: str
) -> None:
    found, ids = parameters_of(tiny_tokenizer, list(enumerate(texts)), patterns=[pattern])
    mask, at = found.patterns, 0
    for action in ids:
        pieces = texts_of_kinds(tiny_tokenizer, np.asarray(action))
        covered = {
            letter
            for match in re.finditer(pattern, "".join(pieces))
            for letter in range(match.start(), match.end())
        }
        end = 0
        for piece in pieces:
            begin, end = end, end + len(piece)
            assert mask[at] == bool(covered & set(range(begin, end)))
            at += 1


def test_patterns_do_not_reach_from_one_action_into_the_next() -> None:
    texts, kind_of = ["a", "b"], np.asarray([0, 1, 0, 1])
    starts = np.asarray([True, False, True, False])
    assert pattern_matches(texts, kind_of, starts, ["ba", "^b"]).tolist() == [False] * 4
    assert pattern_matches(texts, kind_of, starts, ["^ab$"]).tolist() == [True] * 4


@settings(max_examples=60)
@given(
    picks=st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(TEMPLATES[:5]),
            st.sampled_from([*NAMES[:6], "a1", "total", "carol's [text]"]),
        ),
        min_size=1,
        max_size=24,
    ),
    seed=st.integers(0, 9),
)
def test_order_of_actions_does_not_matter(
    tiny_tokenizer: "PreTrainedTokenizerFast", picks: list[tuple[int, str, str]], seed: int
) -> None:
    actions = [(task, template.format(value)) for task, template, value in picks]
    shuffled = random.Random(seed).sample(actions, len(actions))
    options = {"patterns": PARAMETER_PATTERNS, "min_values": 2, "max_share": 0.4}
    shown = []
    for order in (actions, shuffled):
        found, ids = parameters_of(tiny_tokenizer, order, **options)  # type: ignore[arg-type]
        texts = marked_texts(tiny_tokenizer, found.binding, ids)
        shown.append(dict(zip(order, texts, strict=True)))
    assert shown[0] == shown[1]


def test_a_corpus_of_one_token_is_no_trouble(tiny_tokenizer: "PreTrainedTokenizerFast") -> None:
    found, _ = parameters_of(tiny_tokenizer, [(0, "[")], patterns=PARAMETER_PATTERNS)
    assert found.binding.tolist() == [False]


def test_arguments_of_recorded_tool_calls_are_marked_and_names_of_tools_are_not(
    smollm2_tokenizer: "PreTrainedTokenizerFast",
) -> None:
    file = TAU_BENCH / "retail_grok-3.jsonl.gz"
    if not file.exists():
        pytest.skip(f"there is no recording {file}")
    actions: list[Action] = []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            episode = json.loads(line)
            actions += [
                (
                    int(episode["task_id"]),
                    json.dumps({key: call[key] for key in call if key != "id"}),
                )
                for message in episode["messages"]
                for call in message.get("tool_calls") or []
            ]
    found, ids = parameters_of(smollm2_tokenizer, actions, min_values=5, max_share=0.15)
    shown = marked_texts(smollm2_tokenizer, found.slots | found.kinds, ids)
    calls = [text for text in shown if text.startswith('{"name": "find_user_id_by_name_zip"')]
    first_names = [re.findall(r'"first_name": "([^"]*)"', text)[0] for text in calls]
    assert len(calls) > 50
    assert all(name.startswith("<<") and name.endswith(">>") for name in first_names)
    assert any(text.startswith('{"name": "get_order_details", "arguments": {"') for text in shown)
