"""Mining from end to end, on texts of a tiny tokenizer."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mined_texts import (
    LOOSE,
    NAMES,
    action_ids,
    entropies_of,
    framed,
    loops,
    segment_texts,
)
from tiny_run import ROLLOUTS, make_tiny_run

from lar_lightning.errors import SettingError
from lar_lightning.mining import mine
from lar_lightning.mining.coverage import coverage_of
from lar_lightning.mining.executability import Refusal, compare_with_tokenizer, texts_of
from lar_lightning.mining.mine import MAX_DIFFERENT_SHARE
from lar_lightning.mining.parameters import REPLACEMENT
from lar_lightning.run_folder import trajectory_path
from lar_lightning.stages import ensure_vocabulary
from lar_lightning.tokenizer import decode, encode_text
from lar_lightning.trajectories import NO_ENTROPY, Trajectory, TrajectoryFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    Make = Callable[..., Trajectory]


def test_mined_latents_shorten_their_corpus_and_lose_nothing(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    trajectories = loops(make_trajectory)
    mined = mine(trajectories, tiny_tokenizer, LOOSE)
    vocabulary = mined.vocabulary
    actions = [ids for trajectory in trajectories for ids in action_ids(trajectory)]
    encoded = [vocabulary.encode(ids) for ids in actions]
    assert [vocabulary.expand(units) for units in encoded] == actions
    assert sum(map(len, encoded)) < 0.6 * sum(map(len, actions))
    assert len(mined.corpus) == sum(map(len, actions))
    assert mined.entropy_kind == "exact"
    assert 1 <= len(vocabulary) <= LOOSE.max_latents
    for latent in vocabulary.latents:
        assert latent.text == decode(tiny_tokenizer, latent.segment)
        assert len(latent.segment) <= LOOSE.max_length
        assert latent.support >= LOOSE.min_support
        assert latent.inner_entropy == pytest.approx(0.1, abs=1e-3)
        assert latent.realizations == ()


def test_support_as_a_share_finds_what_that_many_tasks_find(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    trajectories = loops(make_trajectory)
    num_tasks = mine(trajectories, tiny_tokenizer, LOOSE).corpus.num_tasks
    found = {}
    for support in (num_tasks // 2, 0.5, 1):
        settings = replace(LOOSE, min_support=support)
        found[support] = mine(trajectories, tiny_tokenizer, settings).vocabulary.segments
    assert num_tasks % 2 == 0
    assert found[0.5] == found[num_tasks // 2] != found[1]


def test_support_and_occurrences_are_those_beside_the_others(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    trajectories = loops(make_trajectory)
    vocabulary = mine(trajectories, tiny_tokenizer, LOOSE).vocabulary
    units = [
        (trajectory.task_id, unit)
        for trajectory in trajectories
        for ids in action_ids(trajectory)
        for unit in vocabulary.encode(ids)
    ]
    for index, latent in enumerate(vocabulary.latents, start=vocabulary.base_size):
        tasks = [task for task, unit in units if unit == index]
        assert latent.num_occurrences == len(tasks)
        assert latent.support == len(set(tasks))


def test_ranks_are_the_order_of_what_latents_save(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    vocabulary = mine(loops(make_trajectory), tiny_tokenizer, LOOSE).vocabulary
    assert sorted(latent.rank for latent in vocabulary.latents) == list(range(len(vocabulary)))
    by_rank = sorted(vocabulary.latents, key=lambda latent: latent.rank)
    saved = [latent.num_occurrences * (len(latent.segment) - 1) for latent in by_rank]
    assert saved[0] == max(saved)
    assert len(set(segment_texts(vocabulary))) == len(vocabulary)


def test_samples_of_one_task_do_not_support_each_other(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    trajectories = [
        make_trajectory("    return result\n", task_id=str(index % 3)) for index in range(20)
    ]
    with pytest.raises(SettingError, match="of 3 tasks"):
        mine(trajectories, tiny_tokenizer, LOOSE)


def test_what_binds_a_parameter_or_ends_a_turn_is_never_inside(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    text = (
        "for letter in text: \U0001f642 total = total + 10 <|im_end|> return result \u00b2 numbers"
    )
    trajectories = [make_trajectory(f"{name} {text}", task_id=name) for name in NAMES]
    vocabulary = mine(trajectories, tiny_tokenizer, LOOSE).vocabulary
    assert len(vocabulary) >= 3
    special = set(tiny_tokenizer.all_special_ids)
    for latent in vocabulary.latents:
        assert not special & set(latent.segment)
        for token in latent.segment:
            assert REPLACEMENT not in decode(tiny_tokenizer, [token])
        assert not any(letter.isdigit() for letter in latent.text)


def test_values_of_slots_and_matches_of_patterns_are_never_inside(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """Pairs of tasks share a value, which would be support enough; `strings.py` is a file."""
    values = [NAMES[index // 2] for index in range(len(NAMES))]
    trajectories = [
        make_trajectory(f'return total(letter="{value}") in strings.py for', task_id=name)
        for name, value in zip(NAMES, values, strict=True)
    ]
    pairs = replace(LOOSE, min_support=2, min_slot_values=4)
    texts = segment_texts(mine(trajectories, tiny_tokenizer, pairs).vocabulary)
    assert any("letter" in text for text in texts)
    assert not any("strings" in text or ".py" in text for text in texts)
    assert not any(f'"{value}' in text for value in values for text in texts)
    no_slots = replace(pairs, min_slot_values=99, parameter_patterns=())
    texts = segment_texts(mine(trajectories, tiny_tokenizer, no_slots).vocabulary)
    assert any("strings" in text or ".py" in text for text in texts)


@pytest.mark.parametrize(
    ("num_uncertain", "is_inside"), [(0, True), (1, True), (2, False), (8, False)]
)
def test_decisions_are_inside_in_their_share_of_occurrences_at_most(
    make_trajectory: "Make",
    tiny_tokenizer: "PreTrainedTokenizerFast",
    num_uncertain: int,
    is_inside: bool,
) -> None:
    """Of eight places at least .8 must be certain: one decision is let through, two are not."""
    text = "\n    result = []\n    return result\n"
    trajectories = [
        make_trajectory(
            name + text,
            task_id=name,
            entropies=entropies_of(
                tiny_tokenizer, name + text, " return", 5.0 if index < num_uncertain else 0.1
            ),
        )
        for index, name in enumerate(NAMES)
    ]
    vocabulary = mine(trajectories, tiny_tokenizer, LOOSE).vocabulary
    (token,) = encode_text(tiny_tokenizer, " return")
    assert any(token in latent.segment[1:] for latent in vocabulary.latents) == is_inside
    assert any(token in latent.segment[:1] for latent in vocabulary.latents) != is_inside


def without_entropies(trajectory: Trajectory) -> Trajectory:
    nothing = np.full(len(trajectory.token_ids), np.nan, dtype=np.float32)
    return replace(trajectory, entropies=nothing, entropy_kind=NO_ENTROPY)


def test_without_entropies_nothing_is_a_decision(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    trajectories = loops(make_trajectory)
    with_entropies = mine(trajectories, tiny_tokenizer, LOOSE)
    mined = mine([without_entropies(t) for t in trajectories], tiny_tokenizer, LOOSE)
    assert mined.entropy_kind == "none"
    assert not mined.corpus.has_decision.any()
    assert {latent.inner_entropy for latent in mined.vocabulary.latents} == {None}
    assert set(mined.vocabulary.segments) == set(with_entropies.vocabulary.segments)
    assert [latent.rank for latent in mined.vocabulary.latents] == list(
        range(len(mined.vocabulary))
    )


def test_latents_stand_in_the_order_of_their_entropy_and_unknown_ones_last(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """Three phrases in tasks of their own: uncertain, certain, never read by the policy."""
    uncertain = framed(make_trajectory, " return result\n", entropies=0.9)
    certain = framed(make_trajectory, "):\n    for", entropies=0.2)
    unread = [without_entropies(t) for t in framed(make_trajectory, " numbers[i] - ")]
    trajectories = [
        replace(t, task_id=f"{number} {t.task_id}", trajectory_id=f"{number} {t.task_id}")
        for number, group in enumerate((uncertain, certain, unread))
        for t in group
    ]
    vocabulary = mine(trajectories, tiny_tokenizer, LOOSE).vocabulary
    entropies = [latent.inner_entropy for latent in vocabulary.latents]
    known = [entropy for entropy in entropies if entropy is not None]
    assert {0.2, 0.9} <= set(known)
    assert known == sorted(known)
    assert entropies[len(known) :] == [None] * (len(entropies) - len(known)) != []


def test_target_rate_is_reached_with_the_most_certain_latents(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    trajectories = loops(make_trajectory)
    whole = mine(trajectories, tiny_tokenizer, LOOSE).vocabulary
    for rate in (0.0, 0.2, 0.4, 1.0):
        part = mine(trajectories, tiny_tokenizer, replace(LOOSE, target_rate=rate)).vocabulary
        assert part.latents == whole.latents[: len(part)]
        assert coverage_of(part, trajectories).rate >= rate or part.latents == whole.latents
    assert len(part) == len(whole) > 1
    small = mine(trajectories, tiny_tokenizer, replace(LOOSE, target_rate=0.2)).vocabulary
    assert len(small) < len(whole)


def test_prompts_are_mined_where_they_have_a_weight(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    prompt = "You are a helpful assistant."
    trajectories = [make_trajectory(name, task_id=name, prompt=prompt) for name in NAMES]
    with pytest.raises(SettingError, match="at least one segment"):
        mine(trajectories, tiny_tokenizer, LOOSE)
    vocabulary = mine(trajectories, tiny_tokenizer, replace(LOOSE, scaffold_weight=0.1)).vocabulary
    assert any("helpful" in text for text in segment_texts(vocabulary))
    coverage = coverage_of(vocabulary, trajectories)
    assert coverage.prompt_saving > 0.3
    assert coverage.action_saving == 0


def test_entropy_of_a_latent_is_that_of_actions_where_prompts_have_it_too(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    texts = [f"{name} for number in numbers:{name}" for name in NAMES]
    trajectories = [make_trajectory(text, prompt=text, entropies=0.3) for text in texts]
    settings = replace(LOOSE, scaffold_weight=0.5)
    latents = mine(trajectories, tiny_tokenizer, settings).vocabulary.latents
    (latent,) = [latent for latent in latents if "number in" in latent.text]
    assert latent.num_occurrences == 2 * len(NAMES)
    assert latent.inner_entropy == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_order_of_trajectories_does_not_matter(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast", seed: int
) -> None:
    trajectories = loops(make_trajectory)
    expected = mine(trajectories, tiny_tokenizer, LOOSE)
    random.Random(seed).shuffle(trajectories)
    mined = mine(trajectories, tiny_tokenizer, LOOSE)
    assert mined.vocabulary.latents == expected.vocabulary.latents
    assert mined.stability.refused == expected.stability.refused
    assert mined.comparison.num_units == expected.comparison.num_units


def test_one_temperature_is_mined_and_the_others_still_veto(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """`):` and a newline are two tokens, unless an indented line follows: it takes the newline."""
    greedy = [
        make_trajectory(f"{name}(text):\n{name} = result", task_id=name, temperature=0.0)
        for name in NAMES
    ]
    sampled = [
        make_trajectory(f"{name}(text):\n    return strings", task_id=name) for name in NAMES
    ]
    served = replace(LOOSE, temperature=0.0, max_misaligned_share=0.2)
    alone = mine(greedy, tiny_tokenizer, served).vocabulary
    mined = mine([*greedy, *sampled], tiny_tokenizer, served)
    assert len(mined.corpus) == sum(trajectory.horizon for trajectory in greedy)
    assert any(text.endswith("):\n") for text in segment_texts(alone))
    assert not any(text.endswith("):\n") for text in segment_texts(mined.vocabulary))
    assert not any("strings" in text for text in segment_texts(mined.vocabulary))
    assert Refusal.MISALIGNED in mined.stability.refused.values()


def test_latents_stand_where_the_extended_tokenizer_puts_them(
    make_trajectory: "Make", tiny_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """A lax share lets unstable texts pass; the comparison of whole texts takes them back."""
    flat = [make_trajectory(f"{name}(text):\n{name}", task_id=name) for name in NAMES]
    indented = [make_trajectory(f"{name}(text):\n    total", task_id=name) for name in NAMES[:2]]
    trajectories = [*flat, *indented]
    mined = mine(trajectories, tiny_tokenizer, replace(LOOSE, max_misaligned_share=1.0))
    assert Refusal.DISPUTED in mined.stability.refused.values()
    assert not set(mined.stability.refused) & set(mined.vocabulary.segments)
    comparison = compare_with_tokenizer(
        tiny_tokenizer, mined.vocabulary, texts_of(trajectories, tiny_tokenizer)
    )
    assert comparison.different_share == mined.comparison.different_share <= MAX_DIFFERENT_SHARE


class Policy:
    """Goes on alike whatever was written, or minds the first letter's case."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", minds: str) -> None:
        self.tokenizer = tokenizer
        self.minds = minds

    def __call__(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        rows = np.log([[0.5, 0.5], [0.9, 0.1]])
        texts = [decode(self.tokenizer, sequence) for sequence in sequences]
        return rows[[int(bool(self.minds) and self.minds in text) for text in texts]]


@pytest.mark.parametrize(("minds", "is_joined"), [("", True), (" The function", False)])
def test_two_spellings_become_one_latent_where_the_policy_goes_on_alike(
    make_trajectory: "Make",
    tiny_tokenizer: "PreTrainedTokenizerFast",
    minds: str,
    is_joined: bool,
) -> None:
    upper = framed(make_trajectory, " The function returns the result;")
    lower = [
        replace(t, task_id=f"lower {t.task_id}", trajectory_id=f"lower {t.task_id}")
        for t in framed(make_trajectory, " the function returns the result;")
    ]
    settings = replace(LOOSE, max_length=24, epsilon=0.05)
    alone = mine([*upper, *lower], tiny_tokenizer, settings)
    scorer = Policy(tiny_tokenizer, minds)
    mined = mine([*upper, *lower], tiny_tokenizer, settings, scorer=scorer)
    realizations = [other for latent in mined.vocabulary.latents for other in latent.realizations]
    assert not any(latent.realizations for latent in alone.vocabulary.latents)
    assert bool(realizations) == is_joined
    assert bool(mined.refused_realizations) != is_joined
    assert not set(realizations) & set(mined.vocabulary.segments)
    assert {*mined.vocabulary.segments, *realizations} == set(alone.vocabulary.segments)
    unasked = replace(settings, epsilon=0.0)
    assert mine([*upper, *lower], tiny_tokenizer, unasked, scorer=scorer).vocabulary.classes == {}


def test_other_runs_share_the_vocabulary(
    tmp_path: Path, tiny_checkpoint: Path, make_trajectory: "Make"
) -> None:
    run_dir = make_tiny_run(tmp_path / "run", tiny_checkpoint)
    other = tmp_path / "other"
    file = TrajectoryFile(trajectory_path(other, "train"), {})
    for trajectory in loops(make_trajectory):
        file.append(trajectory)
    settings = replace(LOOSE, max_latents=24)
    alone, shared = (
        ensure_vocabulary(str(tiny_checkpoint), run_dir, ROLLOUTS, replace(settings, also=also))
        for also in ((), (other,))
    )
    phrase = "result.append("
    assert not any(phrase in text for text in segment_texts(alone))
    assert any(phrase in text for text in segment_texts(shared))
