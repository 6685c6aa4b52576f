"""The boundary that a schedule finds against fixed rates: `make bench-abstraction`.

First the schedule, then a run for each of its sizes that has this many latents from its first step:
the same trajectories, the same latents (those of lowest entropy), as many epochs as the schedule
spends on one stage, or with `--equal_steps` as many as it had spent by then. A fixed rate holds
where its held-out divergence is within the schedule's limit; all are measured alike, by a schedule
of one stage. The boundary should save at least as much as the best fixed rate that holds.

Each run is a folder of `--out` that the verb `fit` makes; what is finished is reused. Further
options are passed on to `fit`. The last line is one JSON object with all figures.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
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
    best = [
        max((float(row["saving"]) for row in rows if row["holds"] == "1"), default=0.0)
        for rows in (schedule, fixed)
    ]
    verdict = "at least" if best[0] >= best[1] else "NOT"
    lines.append(
        f"\nboundary saves {best[0]:.4f}, the best fixed rate {best[1]:.4f}: {verdict} as good"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
