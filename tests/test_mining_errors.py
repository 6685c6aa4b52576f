"""What mining says where it cannot find anything, and of settings that cannot work."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from mined_texts import FRAME, LOOSE, NAMES, framed, loops

from lar_lightning.errors import SettingError
from lar_lightning.mining import mine
from lar_lightning.settings import MiningSettings
from lar_lightning.trajectories import Span, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    Make = Callable[..., Trajectory]


def test_temperature_that_was_not_rolled_out_is_refused(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    with pytest.raises(SettingError, match=r"`mining.temperature`.*got 0\.5, there are 1\.0"):
        mine(loops(make_trajectory), tiny_tokenizer, MiningSettings(temperature=0.5))


def prompts_only(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, spans=(Span(role="user", start=0, end=len(trajectory.token_ids)),))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("rare", r"`mining.min_support` \(99\)"),
        ("decisions", r"raise `mining.max_entropy` \(2\.0\)"),
        ("one task", "27 tokens of 1 tasks"),
        ("turn ends", "8 tokens of 8 tasks \\(100% of them bind parameters"),
        ("one token", "1 tokens of 1 tasks"),
        ("no actions", "0 tokens of 8 tasks"),
    ],
)
def test_corpus_without_a_segment_says_what_to_change(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast", kind: str, message: str
) -> None:
    settings = replace(LOOSE, min_support=99) if kind == "rare" else LOOSE
    trajectories = {
        "rare": loops(make_trajectory),
        "decisions": framed(make_trajectory, " return result\n", entropies=9.0),
        "one task": loops(make_trajectory)[:1],
        "turn ends": [make_trajectory("", task_id=name) for name in NAMES],
        "one token": [make_trajectory("a", is_finished=False)],
        "no actions": [prompts_only(trajectory) for trajectory in loops(make_trajectory)],
    }[kind]
    with pytest.raises(SettingError, match=rf"must leave at least one segment.*{message}"):
        mine(trajectories, tiny_tokenizer, settings)


@pytest.mark.slow
def test_one_enormous_trajectory_is_one_witness(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    text = "".join(FRAME.format(random.Random(number).choice(NAMES)) for number in range(3000))
    with pytest.raises(SettingError, match="of 1 tasks"):
        mine([make_trajectory(text, task_id="one")], tiny_tokenizer, LOOSE)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_latents", [-1]),
        ("min_support", [0, -1, 1.5, float("nan")]),
        ("max_length", [1]),
        ("min_slot_values", [1]),
        ("max_entropy", [0.0, -1.0, float("nan")]),
        ("min_certain_share", [-0.1, 1.1, float("nan")]),
        ("max_misaligned_share", [-0.1, 1.1]),
        ("max_slot_share", [-0.1, 1.1]),
        ("target_rate", [-0.1, 1.1]),
        ("scaffold_weight", [-0.1, 1.1]),
        ("epsilon", [-0.1, float("nan")]),
    ],
)
def test_settings_that_cannot_work_are_named(name: str, values: Sequence[float]) -> None:
    for value in values:
        with pytest.raises(SettingError, match=f"`mining.{name}` must .*got {value}"):
            MiningSettings(**{name: value})  # type: ignore[arg-type]


def test_broken_patterns_are_named() -> None:
    with pytest.raises(
        SettingError, match=r"`mining.parameter_patterns` must be regular.*got '\['"
    ):
        MiningSettings(parameter_patterns=("[",))


def test_prompt_tokens_are_worth_less_than_generated_ones() -> None:
    with pytest.raises(SettingError, match=r"`mining.scaffold_weight` must be below 1"):
        MiningSettings(scaffold_weight=1.0)


def test_support_is_a_number_of_tasks_or_a_share_of_them() -> None:
    assert [MiningSettings(min_support=8).least_support(n) for n in (4, 400)] == [8, 8]
    assert [MiningSettings(min_support=0.16).least_support(n) for n in (4, 120, 400)] == [2, 20, 64]
    assert MiningSettings(min_support=1).least_support(50) == 1
