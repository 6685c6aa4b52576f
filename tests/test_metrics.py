"""Counts of horizon, usage and rates: closed forms, and parts that are merged."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import Metric

from lar_lightning.metrics import Horizon, LatentUsage, Ratio, Speed
from lar_lightning.metrics.generated import GeneratedMetrics
from lar_lightning.metrics.generations import (
    GeneratedSample,
    GenerationPrompt,
    held_out_prompts,
    repeated_ngrams,
)
from lar_lightning.metrics.records import StepRecords, UsageFiles
from lar_lightning.segments import LatentAction, LatentVocabulary

NUM_LATENTS = 5
latents = st.lists(st.integers(0, NUM_LATENTS - 1), max_size=12)
unit_lengths = st.lists(st.integers(1, 6), max_size=12)


def filled(metric: Metric, *updates: Sequence[object]) -> Metric:
    for update in updates:
        metric.update(*update)
    return metric


def values_of(metric: Metric) -> dict[str, object]:
    """Return what a metric computes as plain numbers; asked for by hand, nothing is cached."""
    metric._computed = None
    computed = metric.compute()
    computed = computed if isinstance(computed, dict) else {"value": computed}
    return {name: value.tolist() for name, value in computed.items()}


def integers(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_horizon_of_a_text_in_closed_form() -> None:
    metric = filled(Horizon(), (integers([1, 3, 1, 2]), 6, 9), (integers([1]),))
    assert values_of(metric) == pytest.approx(
        {
            "horizon_units": 5,
            "horizon_tokens": 8,
            "units_per_token": 5 / 8,
            "horizon_reduction": 3 / 8,
            "reparameterization_rate": 5 / 8,
            "prompt_units": 6,
            "prompt_tokens": 9,
            "prompt_reduction": 1 / 3,
        }
    )


def test_nothing_counted_saves_nothing() -> None:
    values = values_of(filled(Horizon(), (integers([]),)))
    assert values["units_per_token"] == 1
    assert values["horizon_reduction"] == values["prompt_reduction"] == 0
    assert values["reparameterization_rate"] == 0
    usage = values_of(filled(LatentUsage(3), (integers([]), integers([]))))
    assert usage["adoption"] == usage["usage_perplexity"] == usage["num_dead_latents"] == 0
    assert usage["num_absent_latents"] == 3
    assert values_of(filled(Ratio(), (0, 0))) == {"value": 0}


@given(st.integers(1, NUM_LATENTS), st.integers(1, 4))
def test_perplexity_of_latents_used_alike_is_their_number(num_used: int, times: int) -> None:
    places = integers([*range(num_used)] * times)
    values = values_of(filled(LatentUsage(NUM_LATENTS), (places, places)))
    assert values["usage_perplexity"] == pytest.approx(num_used)
    assert values["num_absent_latents"] == NUM_LATENTS - num_used
    assert values["adoption"] == 1
    assert values["num_dead_latents"] == 0


def test_perplexity_and_adoption_of_uneven_use() -> None:
    metric = filled(
        LatentUsage(3),
        (integers([0, 0, 1, 1]), integers([0, 0, 1, 1]), torch.tensor([0.9, 0.6, 0.01, 0.02])),
    )
    values = values_of(metric)
    shares = (1.5 / 1.53, 0.03 / 1.53)
    assert values["adoption"] == pytest.approx(1.53 / 4)
    assert values["usage_perplexity"] == pytest.approx(
        math.exp(-sum(share * math.log(share) for share in shares))
    )
    assert values["num_dead_latents"] == 1  # due twice, taken with 1.5 % on average
    assert values["num_absent_latents"] == 1
    assert values["taken"] == pytest.approx([1.5, 0.03, 0])


@given(st.lists(st.tuples(unit_lengths, st.integers(0, 9), st.integers(9, 20)), max_size=4))
def test_parts_of_a_horizon_merge_into_the_whole(parts: list) -> None:
    updates = [(integers(lengths), units, tokens) for lengths, units, tokens in parts]
    whole = filled(Horizon(), (integers([2]), 1, 1), *updates)
    merged = filled(Horizon(), (integers([2]), 1, 1))
    for update in updates:
        merged.merge_state(filled(Horizon(), update))
    assert values_of(merged) == values_of(whole)


@given(st.lists(st.tuples(latents, latents), max_size=4))
def test_parts_of_usage_merge_into_the_whole(parts: list) -> None:
    updates = [(integers(due), integers(taken)) for due, taken in parts]
    whole = filled(LatentUsage(NUM_LATENTS), (integers([1]), integers([2])), *updates)
    merged = filled(LatentUsage(NUM_LATENTS), (integers([1]), integers([2])))
    for update in updates:
        merged.merge_state(filled(LatentUsage(NUM_LATENTS), update))
    assert values_of(merged) == values_of(whole)
    counts = values_of(whole)
    assert sum(counts["due"]) == 1 + sum(len(due) for due, _ in parts)  # type: ignore[arg-type]
    assert 1 <= counts["usage_perplexity"] <= NUM_LATENTS + 1e-9  # type: ignore[operator]


def test_processes_side_by_side_add_their_work_and_not_their_time() -> None:
    one, other = filled(Speed(), (30, 2.0), (30, 1.0)), filled(Speed(), (40, 4.0))
    assert values_of(one) == {"value": 20}
    one.merge_state(other)
    assert values_of(one) == {"value": 25}


@given(st.lists(st.integers(0, 2), max_size=20))
def test_repeated_ngrams_are_those_that_stood_before(tokens: list[int]) -> None:
    repeated, total = repeated_ngrams(tokens, 2)
    pairs = list(pairwise(tokens))
    assert total == len(pairs)
    assert repeated == sum(pair in pairs[:index] for index, pair in enumerate(pairs))


def toy_vocabulary() -> LatentVocabulary:
    segments = {"ab": (0, 1), "abc": (0, 1, 2)}
    actions = [LatentAction(segment=ids, text=text) for text, ids in segments.items()]
    return LatentVocabulary(actions, base_size=4)


def sample(units: Sequence[int], text: str, teacher: str | None) -> GeneratedSample:
    vocabulary = toy_vocabulary()
    prompt = GenerationPrompt(
        trajectory_id="t@0#0", task_id="t", units=(3, 4), num_tokens=3, teacher_tokens=None
    )
    return GeneratedSample(
        prompt=prompt,
        units=tuple(units),
        tokens=tuple(vocabulary.expand(units)),
        is_finished=units[-1] == 3,
        text=text,
        teacher_text=teacher,
    )


def test_figures_of_generated_texts() -> None:
    metrics = GeneratedMetrics(toy_vocabulary())
    # `abcab!`: its code is [5, 4, 3]; written here as [5, 0, 1, 3], one unit more.
    metrics.update([sample([5, 0, 1, 3], "abcab!", "abcxx!")], 2.0)
    metrics.update([sample([0, 1], "ab", None)], 1.0)
    values, histograms = metrics.values()
    assert values["horizon_units"] == 6
    assert values["horizon_tokens"] == 8
    assert values["adoption"] == pytest.approx(1 / 3)  # of the code's 5, 4 and 4
    assert histograms == {"due": [2, 1], "taken": [0, 1]}
    assert values["num_used_latents"] == 1
    assert values["excess_share"] == pytest.approx(2 / 6)
    assert values["agreement"] == pytest.approx(3 / 6)
    assert values["identical_share"] == 0
    assert values["truncated_share"] == 0.5
    assert values["tokens_per_text"] == 4
    assert values["expanded_tokens_per_second"] == pytest.approx(8 / 3)
    assert values["prompt_reduction"] == pytest.approx(1 / 3)


def test_prompts_are_greedy_and_spread_over_tasks(make_trajectory) -> None:
    vocabulary = LatentVocabulary([], base_size=10_000)
    trajectories = [
        make_trajectory(f"text {task}", task_id=f"task {task}", temperature=temperature)
        for task in range(9)
        for temperature in (1.0, 0.0)
    ]
    chosen = held_out_prompts(trajectories, vocabulary, num_prompts=3, max_length=1e9)
    assert [prompt.task_id for prompt in chosen] == ["task 0", "task 4", "task 8"]
    for prompt in chosen:
        whole = next(t for t in trajectories if t.trajectory_id == prompt.trajectory_id)
        assert whole.temperature == 0
        assert [*prompt.units, *(prompt.teacher_tokens or ())] == whole.token_ids.tolist()
    warm = [item for item in trajectories if item.temperature]
    assert (
        held_out_prompts(warm, vocabulary, num_prompts=1, max_length=1e9)[0].teacher_tokens is None
    )
    assert held_out_prompts(trajectories, vocabulary, num_prompts=3, max_length=2) == []


def test_a_run_that_goes_on_replaces_what_came_after_its_step(tmp_path: Path) -> None:
    file = StepRecords(tmp_path / "metrics" / "records.jsonl")
    for step in (0, 5, 10):
        file.put(step, [{"value": step}], "a")
        file.put(step, [{"value": -step}], "b")
    file.put(5, [{"value": 50}], "a")
    assert [(r["step"], r["source"], r["value"]) for r in file.read()] == [
        (0, "a", 0),
        (0, "b", 0),
        (5, "b", -5),
        (5, "a", 50),
    ]


def test_usage_table_has_a_line_for_each_latent_and_no_raw_text(tmp_path: Path) -> None:
    import csv

    latent = LatentAction(segment=(0, 1), text="=1+1\n\x1b[31m")
    files = UsageFiles(tmp_path, LatentVocabulary([latent], base_size=4))
    files.add(0, "held_out", {"due": [3.0], "taken": [1.23456]})
    files.add(0, "generated", {"due": [2.0], "taken": [1.0]})
    files.history.path.write_text(files.history.path.read_text() + "torn {")
    files.add(7, "generated", {"due": [4.0], "taken": [2.0]})
    (row,) = csv.DictReader((tmp_path / "metrics" / "latent_usage.csv").open())
    assert row == {
        "latent": "0",
        "text": '"=1+1\\n\\u001b[31m"',
        "num_tokens": "2",
        "held_out_due": "3.0",
        "held_out_taken": "1.2346",
        "generated_due": "4.0",
        "generated_taken": "2.0",
    }
    assert [record["step"] for record in files.history.read()] == [0, 0, 7]
