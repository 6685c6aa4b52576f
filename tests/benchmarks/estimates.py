"""Estimates against measured steps, and the machine's utilisation: `make bench-estimates`.

Random models of several sizes take steps of several lengths in turns, so that what else the machine
does hits all alike; each counts with its fastest step. For each: peak memory and operations as
estimated and as measured, and the time that is predicted with the utilisation of *another* step,
the calibration (`CALIBRATION`): seconds = operations / (speed of matrix products x utilisation).
The last line is one JSON object.
"""

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import torch

from lar_lightning.estimates.backbones import Backbone
from lar_lightning.estimates.memory import memory_of
from lar_lightning.estimates.speed import flops_of
from tests.benchmarks.meter import FlopCounter
from tests.benchmarks.train import matrix_speed
from tests.measured_steps import SmallStep, measured_bytes

BASE = Backbone(
    name="base",
    num_layers=6,
    hidden_size=512,
    feed_forward_size=1536,
    num_heads=8,
    num_key_heads=4,
    head_size=64,
    vocabulary_size=16_000,
)
DEEPER = replace(BASE, name="deeper", num_layers=9)
WIDER = replace(BASE, name="wider", hidden_size=640, num_heads=10, num_key_heads=5)
CASES: dict[str, tuple[Backbone, Any, int]] = {
    f"{backbone.name} {trainable} {length}": (backbone, trainable, length)
    for trainable in ("rows", "lora", "full")
    for backbone, length in ((BASE, 512), (BASE, 768), (DEEPER, 512), (WIDER, 768))
}
CALIBRATION = "base {trainable} 512"


def main() -> None:
    """Measure, and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_rounds", type=int, default=5, help="steps of each case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="part of the names of cases")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = {name: case for name, case in CASES.items() if options.only in name}
    steps = {name: SmallStep(b, trainable=t, num_tokens=n) for name, (b, t, n) in cases.items()}
    figures = {name: _counted(cases[name][0], step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    speeds = []
    for _ in range(options.num_rounds):
        speeds.append(matrix_speed())
        for name, step in steps.items():
            start = time.thread_time() if options.threads == 1 else time.perf_counter()
            step.run()
            end = time.thread_time() if options.threads == 1 else time.perf_counter()
            seconds[name].append(end - start)
    speed = max(speeds)
    for name, (_, trainable, _) in cases.items():
        figure, known = figures[name], CALIBRATION.format(trainable=trainable)
        utilisation = figures[known]["flops"] / min(seconds[known]) / speed
        figure["seconds"] = min(seconds[name])
        figure["predicted_seconds"] = figure["estimated_flops"] / speed / utilisation
        figure["seconds_ratio"] = figure["predicted_seconds"] / figure["seconds"]
        figure["utilisation"] = figure["flops"] / figure["seconds"] / speed
        print(f"{name:18}" + "  ".join(f"{key} {value:.4g}" for key, value in figure.items()))
    worst = {
        key: max((figure[key] for figure in figures.values()), key=lambda value: abs(value - 1))
        for key in ("memory_ratio", "flops_ratio", "seconds_ratio")
    }
    print(json.dumps({"matrix_gflop_per_second": round(speed / 1e9), "worst": worst}))


def _counted(backbone: Backbone, step: SmallStep) -> dict[str, float]:
    """Return bytes and operations of a step, estimated and measured."""
    work = step.workload
    estimated = {"memory": memory_of(backbone, work).peak, "flops": flops_of(backbone, work)}
    measured = {"memory": float(max(measured_bytes(step).values()))}
    with FlopCounter() as counter:
        step.run()
    return {
        "memory_ratio": estimated["memory"] / measured["memory"],
        "flops_ratio": estimated["flops"] / counter.total,
        "memory": measured["memory"],
        "flops": counter.total,
        "estimated_flops": estimated["flops"],
    }


if __name__ == "__main__":
    main()
