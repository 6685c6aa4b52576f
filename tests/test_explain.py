"""Every reason for which a text is no latent action."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mined_texts import LOOSE, NAMES, entropies_of
from toy_corpora import corpus_from, ids

from lar_lightning.mining import mine
from lar_lightning.mining.explain import explain, places_of
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import MiningSettings
from lar_lightning.tokenizer import encode_text
from lar_lightning.trajectories import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    Make = Callable[..., Trajectory]

PHRASE = "):\n    for number in numbers"
"""Each task writes it, so that there is always something to mine."""


def explained(
    make: "Make",
    tokenizer: "PreTrainedTokenizerFast",
    text: str,
    actions: Sequence[str],
    settings: MiningSettings,
    decision: str = "",
) -> list[str]:
    """Mine tasks that each write a phrase and one of `actions`, and ask about `text`."""
    written = [
        f"{name}{PHRASE} {name}\n{action}" for name, action in zip(NAMES, actions, strict=True)
    ]
    trajectories = [
        make(each, task_id=name, entropies=entropies_of(tokenizer, each, decision, 9.0))
        for name, each in zip(NAMES, written, strict=True)
    ]
    vocabulary = mine(trajectories, tokenizer, settings).vocabulary
    return explain(text, trajectories, tokenizer, settings, vocabulary)


@pytest.mark.parametrize(
    ("text", "actions", "options", "reason"),
    [
        (PHRASE, [""] * 8, {}, r"it is a latent action: rank 0, 8 places in 8 tasks, entropy 0\.1"),
        (" return", [" return"] * 8, {}, "it is one token already"),
        (
            " return letter",
            [f"{name} return letter {name}" for name in NAMES[:3]] + [""] * 5,
            {},
            r"fewer tasks than `min_support` \(4\)",
        ),
        (
            " return letter",
            [f"{name} return letter {name}" for name in NAMES[:3]] + [""] * 5,
            {"min_support": 0.4},
            r"fewer tasks than `min_support` \(0\.4 of 8, 4\)",
        ),
        (PHRASE, [""] * 8, {"max_length": 4}, r"longer than `max_length` \(4 tokens\)"),
        (" total 10", ["total total 10 letter"] * 8, {}, "it contains a digit, a special token"),
        (
            "see strings.py",
            ["see strings.py now"] * 8,
            {},
            "it contains a match of a parameter pattern",
        ),
        (
            '(letter="text',
            [f' total(letter="{name}") ' for name in (*NAMES[:6], "text", "text")],
            {"min_support": 1},
            "it contains a value of a slot",
        ),
        (
            " result = max",
            [f"{name} result = max {name}" for name in NAMES],
            {"decision": " ="},
            r"certain in less than `min_certain_share` \(80%\) of them at H_max 2\.0 nats",
        ),
        (
            "caf\u00e9",
            [f"\ncaf\u00e9\n{name}" for name in NAMES],
            {},
            "does not decode as one token",
        ),
        (
            "(text):\n",
            ["(text):\nb"] * 4 + ["(text):\n    total"] * 4,
            {},
            "its text also stands where the tokens are others",
        ),
        (
            " letter total",
            [f" letter total {name}" for name in NAMES],
            {"max_latents": 1},
            r"others saved more for the budget of 1: 0% of its places begin inside one, and it",
        ),
        (
            " number in",
            [""] * 8,
            {},
            r"others saved more for the budget of \d+: 100% of its places begin inside one",
        ),
    ],
    ids=[
        "a latent",
        "one token",
        "rare",
        "rare by share",
        "long",
        "digit",
        "pattern",
        "slot",
        "decision",
        "broken",
        "misaligned",
        "outdone",
        "inside another",
    ],
)
def test_the_reason_is_named(
    make_trajectory: "Make",
    tiny_tokenizer: "PreTrainedTokenizerFast",
    text: str,
    actions: Sequence[str],
    options: dict[str, int | str],
    reason: str,
) -> None:
    limits = {key: value for key, value in options.items() if key != "decision"}
    settings = replace(LOOSE, **limits)  # type: ignore[arg-type]
    decision = str(options.get("decision", ""))
    lines = explained(make_trajectory, tiny_tokenizer, text, actions, settings, decision)
    num_tokens = len(encode_text(tiny_tokenizer, text))
    assert lines[0].startswith(f"{text!r} is {num_tokens} tokens")
    assert re.search(reason, lines[-1]), lines


def test_all_reasons_are_named_together(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    lines = explained(
        make_trajectory,
        tiny_tokenizer,
        " total 10 for number in numbers",
        [" total 10 for number in numbers", *[""] * 7],
        replace(LOOSE, max_length=6),
    )
    reasons = [line for line in lines if line.startswith("not a latent action: ")]
    assert len(reasons) >= 3
    assert lines[-len(reasons) :] == reasons


def test_what_binds_in_some_places_only_is_told_with_its_share(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """`strings` is the name of a file in two of eight tasks."""
    actions = ["see strings.py"] * 2 + ["see strings now"] * 6
    lines = explained(make_trajectory, tiny_tokenizer, "see strings", actions, LOOSE)
    assert any("25% of its places it contains a match of a parameter" in line for line in lines)


def test_text_that_nobody_wrote_is_explained_too(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    lines = explained(make_trajectory, tiny_tokenizer, " max max max", [""] * 8, LOOSE)
    assert "it stands in 0 places of 0 tasks" in lines
    assert "fewer tasks" in "\n".join(lines)


def test_places_do_not_reach_over_a_start_or_the_end() -> None:
    corpus = corpus_from((0, "abab"), (1, "ab"), (2, "ba"))
    assert places_of(corpus, ids("ab")).tolist() == [0, 2, 4]
    assert places_of(corpus, ids("ba")).tolist() == [1, 6]
    assert places_of(corpus, ids("abc")).tolist() == []
    assert places_of(corpus, ids("aba")).tolist() == [0]
    assert np.asarray(places_of(corpus, ids("z"))).size == 0


def test_latents_of_the_vocabulary_are_told_first(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """The vocabulary has the last word, whatever the trajectories are."""
    trajectories = [make_trajectory(f"{name}{PHRASE} {name}", task_id=name) for name in NAMES]
    vocabulary = mine(trajectories, tiny_tokenizer, LOOSE).vocabulary
    assert isinstance(vocabulary, LatentVocabulary)
    lines = explain(PHRASE, trajectories[:1], tiny_tokenizer, LOOSE, vocabulary)
    assert lines[-1].startswith("it is a latent action")
