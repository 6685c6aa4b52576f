"""The boundary that a schedule finds against fixed rates: `make bench-abstraction`.

First the schedule, then a run for each of its sizes that has this many latents from its first step:
the same trajectories, the same latents (those of lowest entropy), as many epochs as the schedule
spends on one stage, or with `--equal_steps` as many as it had spent by then. All are measured
alike, by a schedule of one stage. For each held-out divergence that any of them ended with, taken
as the limit: the boundary of the schedule, its last stage before one that is beyond the limit, and
the best fixed rate within it. The boundary should save at least as much. `--max_nats 10` has the
schedule go through all stages, so that its boundary is known for every limit.

Each run is a folder of `--out` that the verb `fit` makes; what is finished is reused. Further
options are passed on to `fit`. The last line is one JSON object with all figures.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

Row = dict[str, str]


def main() -> None:
    """Run what is missing, and print the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--source", type=Path, default=Path("runs/quickstart"), help="rollouts")
    parser.add_argument("--out", type=Path, default=Path("runs/abstraction"))
    parser.add_argument("--max_nats", type=float, default=0.5, help="per expanded token")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.2, 0.4, 0.6, 0.8, 1.0])
    parser.add_argument("--num_epochs", type=int, default=1, help="of a stage")
    parser.add_argument("--equal_steps", action="store_true")
    options, rest = parser.parse_known_args()
    schedule = curve(options, "schedule", options.shares, options.num_epochs, rest)
    fixed = []
    for number, share in enumerate(options.shares, 1):
        epochs = options.num_epochs * (number if options.equal_steps else 1)
        fixed += curve(options, f"fixed-{share:g}", [share], epochs, rest)
    print(table(schedule, fixed))
    print(json.dumps({"schedule": schedule, "fixed": fixed}))


def curve(
    options: argparse.Namespace, name: str, shares: list[float], epochs: int, rest: list[str]
) -> list[Row]:
    """Return the stages of a run, made where it is missing."""
    run_dir = options.out / name
    if not (run_dir / "fit.done").exists():
        if not (run_dir / "trajectories").exists():
            shutil.copytree(options.source / "trajectories", run_dir / "trajectories")
        command = [sys.executable, "-m", "lar_lightning", "fit", f"--config={options.config}"]
        command += [
            "--config=configs/overlays/schedule.yaml",
            f"--run_dir={run_dir}",
            f"--trainer.max_epochs={epochs * len(shares)}",
            f"--trainer.callbacks.shares={shares}",
            f"--trainer.callbacks.max_nats_per_token={options.max_nats}",
            *rest,
        ]
        print(" ".join(command[1:]), flush=True)
        with (run_dir / "fit.log").open("a") as log:
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
                raise SystemExit(f"fit failed: see {run_dir / 'fit.log'}")
        (run_dir / "fit.done").touch()
    with (run_dir / "metrics" / "abstraction.csv").open() as file:
        return list(csv.DictReader(file))


def table(schedule: list[Row], fixed: list[Row]) -> str:
    """Return both curves and their best savings in Markdown."""
    names = ("num_latents", "rate", "saving", "nats_per_token", "row_agreement", "holds")
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for label, rows in (("schedule", schedule), ("fixed", fixed)):
        lines += [f"| {label} | " + " | ".join(row[name] for name in names) + " |" for row in rows]
    lines += ["", "| limit, nats a token | boundary saves | best fixed rate saves |"]
    lines.append("| --- | --- | --- |")
    for limit, boundary, best in savings(schedule, fixed):
        lines.append(f"| {limit:.4g} | {boundary:.4f} | {best:.4f} |")
    return "\n".join(lines)


def savings(schedule: list[Row], fixed: list[Row]) -> list[tuple[float, float, float]]:
    """Return for each limit what the boundary of the schedule saves, and the best fixed rate."""
    limits = sorted({float(row["nats_per_token"]) for row in [*schedule, *fixed]})
    return [(limit, boundary_at(schedule, limit), best_at(fixed, limit)) for limit in limits]


def boundary_at(schedule: list[Row], limit: float) -> float:
    """Return what the last stage saves up to which all are within a limit; 0 where none is."""
    held = takewhile(lambda row: is_within(row, limit), schedule)
    return max((float(row["saving"]) for row in held), default=0.0)


def best_at(fixed: list[Row], limit: float) -> float:
    """Return the largest saving within a limit; 0 where there is none."""
    return max((float(row["saving"]) for row in fixed if is_within(row, limit)), default=0.0)


def is_within(row: Row, limit: float) -> bool:
    """Tell whether a run of no alarms ended within a limit."""
    return "alarm" not in row["reason"] and float(row["nats_per_token"]) <= limit


if __name__ == "__main__":
    main()
