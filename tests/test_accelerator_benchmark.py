"""The benchmark for a card, in small on a CPU: what it counts, and what it says of failures."""

import json
import sys
from typing import Any

import pytest
import torch

from tests.benchmarks import accelerator
from tests.benchmarks.accelerator import figures_of

SMALL = ["--device=cpu", "--shape=smoke", "--num_tokens=128", "--num_steps=1"]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["accelerator", *arguments])
    accelerator.main()


def test_contenders_take_steps_whose_operations_are_those_that_are_estimated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run([*SMALL, "--only", "lar_rows", "plain"], monkeypatch)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["device"], result["shape"], result["num_tokens"]) == ("CPU", "smoke", 128)
    ours, plain = (result["figures"][name] for name in ("lar_rows", "plain"))
    assert ours["flops_ratio"] == pytest.approx(1, abs=0.02)
    assert "flops_ratio" not in plain
    assert 0 < ours["gflop_per_token"] < plain["gflop_per_token"]
    assert min(ours["tokens_per_second"], plain["tokens_per_second"]) > 0


def test_a_contender_that_fails_says_why_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run([*SMALL, "--only", "trl", "lar_rows", "--tokenizer=nowhere"], monkeypatch)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("trl: no figures (")
    assert json.loads(last)["figures"].keys() == {"lar_rows"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run([], monkeypatch)
    assert capsys.readouterr().out.startswith("skipped: ")


def test_figures_are_of_the_median_step_behind_the_first() -> None:
    def report(seconds: float, flops: float | None = None) -> dict[str, Any]:
        return {"seconds": seconds, "flops": flops, "peak": 2e9, "estimated": {}}

    figures = figures_of(
        [report(9, 40e9), report(1), report(4), report(2)], num_tokens=8, peak=100e9
    )
    assert figures["tokens_per_second"] == 4
    assert figures["slowest_over_fastest"] == 4
    assert figures["gflop_per_token"] == 5
    assert figures["share_of_peak"] == pytest.approx(0.2)
    assert figures["peak_gb"] == 2
