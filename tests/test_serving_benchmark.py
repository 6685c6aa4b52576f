"""The serving benchmark: its figures, and a run of it on a tiny model."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from lar_lightning.base_models import load_tokenizer
from lar_lightning.export.checkpoint import write_checkpoint
from lar_lightning.models.student import load_student
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.tokenizer import encode_text
from tests.benchmarks.serve import Loads, forced, main, parsed, summary, table
from tests.benchmarks.serving_figures import figures_of, ideals_of, middle_figures, ratios
from tests.benchmarks.serving_load import Job, Load, Timed


def load_of(
    *, num_units: int, num_expanded: int, seconds: float, first: float = 0.5, prompt: int = 100
) -> Load:
    """Two equal answers, one after the other."""
    answer = Timed(
        num_prompt_units=prompt,
        units=tuple(range(num_units)),
        num_expanded=num_expanded,
        first_seconds=first,
        seconds=seconds,
    )
    return Load(wall_seconds=2 * seconds, answers=(answer, answer))


VANILLA = load_of(num_units=101, num_expanded=101, seconds=10.5)
LATENTS = load_of(num_units=51, num_expanded=101, seconds=5.5, prompt=80)


def test_figures_count_expanded_tokens() -> None:
    assert figures_of(VANILLA) == pytest.approx(
        {"first_ms": 500, "token_ms": 100, "episode_s": 10.5, "tokens_per_s": 101 / 10.5}
    )
    assert figures_of(LATENTS) == pytest.approx(
        {"first_ms": 500, "token_ms": 50, "episode_s": 5.5, "tokens_per_s": 101 / 5.5}
    )


def test_ideals_come_from_counts_alone() -> None:
    assert ideals_of(LATENTS, VANILLA) == pytest.approx(
        {"first_ms": 0.8, "token_ms": 51 / 101, "episode_s": 51 / 101, "tokens_per_s": 101 / 51}
    )
    longer = load_of(num_units=102, num_expanded=202, seconds=1.0)  # the same rate, other texts
    ideals = ideals_of(longer, VANILLA)
    assert ideals["token_ms"] == pytest.approx(51 / 101)
    assert ideals["episode_s"] == pytest.approx(102 / 101)


def test_ratios_are_taken_within_rounds() -> None:
    """The machine is twice as slow in the second round, which no ratio sees."""
    slow = load_of(num_units=101, num_expanded=101, seconds=21.0, first=1.0)
    half = load_of(num_units=51, num_expanded=101, seconds=11.0, first=1.0)
    found = ratios([LATENTS, half, LATENTS], [VANILLA, slow, VANILLA])["episode_s"]
    assert found.middle == found.least == found.most == pytest.approx(5.5 / 10.5)
    assert found.against_ideal == pytest.approx(5.5 / 10.5 / (51 / 101))
    spread = ratios([LATENTS, half, LATENTS], [VANILLA, VANILLA, VANILLA])["episode_s"]
    assert (spread.least, spread.most) == pytest.approx((5.5 / 10.5, 11 / 10.5))
    assert spread.middle == spread.least
    assert middle_figures([VANILLA, slow, slow])["episode_s"] == 21.0


def test_forced_answers_take_the_units_of_the_same_text() -> None:
    latent = LatentAction(segment=(3, 4, 5), text="x")
    vocabulary = LatentVocabulary([latent], base_size=10)
    jobs = [Job(messages=(), max_units=64)]
    text = [1, 3, 4, 5, 2]
    for name, num_units in (("vanilla", 5), ("latents", 3), ("latents+ngram", 3)):
        job = forced(name, jobs, [text], vocabulary)[0]
        assert (job.max_units, job.num_expanded) == (num_units, 5)


def test_the_last_line_compares_with_vanilla_of_the_same_speculation() -> None:
    loads: Loads = {
        (name, "forced", concurrency): [load, load]
        for name, load in (
            ("vanilla", VANILLA),
            ("latents", LATENTS),
            ("vanilla+ngram", VANILLA),
            ("latents+ngram", VANILLA),
        )
        for concurrency in (1, 8, 64)
    }
    found = summary(loads)
    assert set(found) == {
        "latents / vanilla",
        "vanilla+ngram / vanilla",
        "latents+ngram / vanilla+ngram",
    }
    ours = found["latents / vanilla"]
    assert ours["wall_clock_over_ideal"] == {"1": pytest.approx(5.5 / 10.5 * 101 / 51, abs=1e-4)}
    assert ours["throughput_of_ideal"] == {"8": pytest.approx(10.5 / 5.5 * 51 / 101, abs=1e-4)}
    assert found["latents+ngram / vanilla+ngram"]["wall_clock_over_ideal"] == {"1": 1.0}
    assert "| latents / vanilla | forced | 64 |" in table(loads)
    assert json.dumps(found)


def test_quick_gives_way_to_what_is_named() -> None:
    options = parsed(["--quick", "--concurrency", "3"])
    assert (options.num_rounds, options.concurrency, options.speculative) == (1, [3], ["off"])
    assert parsed([]).concurrency == [1, 8, 32, 64]


def test_a_missing_export_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--export", str(tmp_path)])
    assert "skipped: there is no export" in capsys.readouterr().out


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_benchmark_runs_on_real_servers(
    wide_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(wide_checkpoint)
    segments = {tuple(encode_text(tokenizer, text)): text for text in (" for i in range", "result")}
    latents = [LatentAction(segment=ids, text=text) for ids, text in segments.items()]
    vocabulary = LatentVocabulary(latents, base_size=len(tokenizer))
    student = load_student(wide_checkpoint, vocabulary)
    write_checkpoint(student, vocabulary, wide_checkpoint, tmp_path / "export")
    options = ["--base_model", str(wide_checkpoint), "--export", str(tmp_path / "export")]
    main([*options, "--quick", "--num_rounds", "2"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = last["results"]["prefix_caching_on"]["latents / vanilla"]
    assert set(rows) == {"free", "forced", "wall_clock_over_ideal", "throughput_of_ideal"}
    for lengths in ("free", "forced"):
        for ratio in (r for row in rows[lengths].values() for r in row.values()):
            assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    # The same text in at most as many units.
    assert rows["forced"]["1"]["episode_s"]["ideal"] <= 1
