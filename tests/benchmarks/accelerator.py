"""One optimizer step at the size of an 8B model on a card: `make bench-accelerator`.

Random weights of a known shape in bf16, adapters of rank 16 in fp32, one random trajectory of which
a fifth falls away. Contenders (`tests.benchmarks.contenders`) run one after another, each in a
process of its own that has the card to itself; the first step warms up and counts operations.

Columns: expanded tokens a second (median step); memory at the peak as PyTorch's allocator handed it
out, as it took it from the card, and as the card counts it (CUDA's context and libraries included);
operations of matrix products and attention that were executed; the share that they reach of the
speed at which this card multiplies matrices in bf16 (measured), and of the maker's figure, which is
the utilisation that `estimate` asks for. For ours also: peak memory and operations as `estimate`
gives them, over what was measured.

The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lar_lightning.estimates.backbones import PRESETS, Backbone
from lar_lightning.estimates.machines import H200
from lar_lightning.metrics.operations import measured_peak
from tests.benchmarks.contenders import CONTENDERS, Parts
from tests.benchmarks.meter import Meter, reports_alone
from tests.measured_steps import random_model, random_trajectories

SMOKE = Backbone(
    name="smoke",
    num_layers=2,
    hidden_size=64,
    feed_forward_size=128,
    num_heads=4,
    num_key_heads=2,
    head_size=16,
    vocabulary_size=600,
)
SHAPES = {**PRESETS, "smoke": SMOKE}
DEFAULT = ("lar_lora", "lar_rows", "lar_lora_checkpointed", "plain", "trl_gkd", "trl")


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--num_tokens", type=int, default=4096, help="of a trajectory, expanded")
    parser.add_argument("--batch_size", type=int, default=1, help="trajectories a step")
    parser.add_argument("--num_steps", type=int, default=5, help="measured of each")
    parser.add_argument("--rows_per_chunk", type=int, default=1024)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(DEFAULT))
    parser.add_argument("--tokenizer", default="", help="any, for the trainers that want one")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        take_steps(options)
    elif options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no card that PyTorch sees")
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Run contenders one after another."""
    peak = measured_peak(torch.device(options.device), torch.bfloat16)
    figures: dict[str, dict[str, float]] = {}
    for name in options.only:
        reports = _reports(name, options)
        if reports:
            figures[name] = figures_of(reports, options.num_tokens * options.batch_size, peak)
            line = "  ".join(f"{key} {value:,.4g}" for key, value in figures[name].items())
            print(f"{name:22}{line}", flush=True)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    setting = {key: vars(options)[key] for key in ("shape", "num_tokens", "batch_size")}
    print(
        json.dumps(
            {
                "device": device,
                **setting,
                "matrix_tflop_per_second": round(peak / 1e12, 1),
                "figures": {
                    name: {key: float(f"{value:.4g}") for key, value in figure.items()}
                    for name, figure in figures.items()
                },
            }
        )
    )


def take_steps(options: argparse.Namespace) -> None:
    """Be one contender."""
    reports = reports_alone()
    torch.manual_seed(0)
    backbone = SHAPES[options.shape]
    vocabulary, aligned = random_trajectories(
        options.num_tokens, backbone.vocabulary_size, options.batch_size
    )

    def load() -> Any:
        with torch.device(options.device):
            return random_model(backbone, torch.bfloat16)

    CONTENDERS[options.contender](
        Parts(
            load=load,
            tokenizer=Path(options.tokenizer),
            vocabulary=vocabulary,
            pairs=[aligned],
            meter=Meter(reports, 1, options.device),
            device=options.device,
            rows_per_chunk=options.rows_per_chunk,
            backbone=backbone,
        )
    )


def _reports(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what a contender says of each step; nothing where it does not get through one."""
    command = [sys.executable, "-m", "tests.benchmarks.accelerator", f"--contender={name}"]
    for key in ("shape", "device", "num_tokens", "batch_size", "rows_per_chunk", "tokenizer"):
        command += [f"--{key}={vars(options)[key]}"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        output, _ = process.communicate("step\n" * (options.num_steps + 1))
        reports = [json.loads(line) for line in output.splitlines()]
        if len(reports) <= options.num_steps:
            errors.seek(0)
            reason = [line for line in errors.read().splitlines() if line.strip()]
            print(f"{name}: no figures ({reason[-1] if reason else process.returncode})")
            return []
    return reports


def figures_of(reports: list[dict[str, Any]], num_tokens: int, peak: float) -> dict[str, float]:
    """Return what is printed of one contender."""
    first, *steps = reports
    seconds = [report["seconds"] for report in steps]
    flops, highest = first["flops"], max(report["peak"] for report in reports)
    figures = {
        "tokens_per_second": num_tokens / median(seconds),
        "slowest_over_fastest": max(seconds) / min(seconds),
        "peak_gb": highest / 1e9,
        "gflop_per_token": flops / num_tokens / 1e9,
        "share_of_peak": flops / median(seconds) / peak,
        "utilisation": flops / median(seconds) / H200.flops,
    }
    if "taken" in first:
        figures["reserved_gb"] = max(report["reserved"] for report in reports) / 1e9
        figures["taken_gb"] = max(report["taken"] for report in reports) / 1e9
        if first["estimated"]:
            figures["memory_ratio"] = first["estimated"]["peak"] / highest
    if first["estimated"]:
        figures["flops_ratio"] = first["estimated"]["flops"] / flops
    return figures


if __name__ == "__main__":
    main()
