"""Runs of a config under its ablations and several seeds, in one table: `make bench-ablations`.

Each run is a folder `OUT/VARIANT-SEED`, made by the verbs `fit` and `evaluate` as a user would make
it, from trajectories that all share; what is finished is reused, so the command can be stopped and
goes on. A seed sets the order of trajectories and the start of adapters. Vanilla is run once.

Rows are means over seeds with their range: divergence a row in nats (folded is behaviour, split is
adoption), rows whose likeliest token is the teacher's, all teacher-forced on held-out trajectories;
then greedy texts of held-out tasks against the vanilla ones. The floor is vanilla against itself:
in the same engine with other batching, and with `--second_engine` in another engine.

The last line is one JSON object with all figures.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from lar_lightning.agents import load_agent
from lar_lightning.benchmarks import benchmark_identity, load_benchmark
from lar_lightning.evaluation.compare import result_row
from lar_lightning.evaluation.runner import Course, Method, evaluate_method, open_engine
from lar_lightning.rollouts.roll_out import split_benchmark
from lar_lightning.run_folder import base_checkpoint, vocabulary_path
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import EvaluationSettings, RolloutSettings

Figures = dict[str, float]
BY_VALIDATION = {
    "val/folded_nats": "folded",
    "val/split_nats": "split",
    "val/row_agreement": "rows agree",
}
BY_EVALUATION = {
    "adoption_rate": "adoption",
    "units_per_expanded_token": "units / token",
    "expanded_tokens_against_vanilla": "text length",
    "agreement": "agreement",
    "identical_texts": "identical",
    "score": "score",
}
COLUMNS = BY_VALIDATION | BY_EVALUATION


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--source", type=Path, default=Path("runs/quickstart"), help="rollouts")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument(
        "--variants", nargs="+", default=["full"], help="`full`, or names in configs/ablations"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--second_engine", choices=["vllm", "transformers"])
    parser.add_argument("--no_texts", action="store_true", help="no greedy texts, only validation")
    options, overrides = parser.parse_known_args()
    found: dict[str, list[Figures]] = {}
    for seed in options.seeds:  # all variants of one seed first: a table that is cut short compares
        for variant in options.variants:
            run_dir = options.out / f"{variant}-{seed}"
            prepare(run_dir, options)
            run(run_dir, variant, seed, options, overrides)
            found.setdefault(variant, []).append(figures_of(run_dir))
            print(table(found), flush=True)
    first = options.out / f"{options.variants[0]}-{options.seeds[0]}"
    floors = {} if options.no_texts else floors_of(first, options)
    print(json.dumps({"floor": floors, "variants": found}))


def prepare(run_dir: Path, options: argparse.Namespace) -> None:
    """Copy rollouts, and vanilla's evaluation where a run has made it."""
    if not (run_dir / "trajectories").exists():
        shutil.copytree(options.source / "trajectories", run_dir / "trajectories")
    for file in sorted(options.out.glob("*/evaluation/vanilla-*.json")):
        target = run_dir / "evaluation" / file.name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)


def run(
    run_dir: Path, variant: str, seed: int, options: argparse.Namespace, overrides: Sequence[str]
) -> None:
    """Fit and evaluate, unless that was done."""
    configs = [f"--config={options.config}"]
    if variant != "full":
        configs.append(f"--config=configs/ablations/{variant}.yaml")
    own = [f"--run_dir={run_dir}", f"--seed_everything={seed}"]
    verbs = {"fit": [f"--data.init_args.loading.seed={seed}", *overrides], "evaluate": []}
    if options.no_texts:
        del verbs["evaluate"]
    for verb, rest in verbs.items():
        log = run_dir / f"{verb}.log"
        if (run_dir / f"{verb}.done").exists():
            continue
        command = [sys.executable, "-m", "lar_lightning", verb, *configs, *own, *rest]
        print(" ".join(command[1:]), flush=True)
        with log.open("w") as file:
            if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
                raise SystemExit(f"{verb} of {variant} with seed {seed} failed: see {log}")
        (run_dir / f"{verb}.done").touch()
    shutil.rmtree(run_dir / "export", ignore_errors=True)  # a copy of the base model for each


def figures_of(run_dir: Path) -> Figures:
    """Return a finished run's figures by column."""
    files = sorted(run_dir.glob("logs/version_*/metrics.csv"))
    rows = [row for file in files for row in csv.DictReader(file.open())]
    last = {key: float(row[key]) for row in rows for key in BY_VALIDATION if row.get(key)}
    if missing := BY_VALIDATION.keys() - last.keys():
        raise SystemExit(
            f"{run_dir} has no {', '.join(sorted(missing))}: fit must validate at its end. With "
            "`--trainer.max_steps N` also set `--trainer.val_check_interval N`."
        )
    figures = {name: last[key] for key, name in BY_VALIDATION.items()}
    if (file := run_dir / "results.json").exists():
        results = json.loads(file.read_text())[1]
        figures |= {name: float(results[key]) for key, name in BY_EVALUATION.items()}
    return figures


def table(found: dict[str, list[Figures]]) -> str:
    """Return means over seeds with their range, in Markdown."""
    lines = [
        "| variant | seeds | " + " | ".join(COLUMNS.values()) + " |",
        "| --- |" + " --- |" * (len(COLUMNS) + 1),
    ]
    for variant, runs in found.items():
        cells = []
        for name in COLUMNS.values():
            values = [figures[name] for figures in runs if name in figures]
            if not values:
                cells.append("")
                continue
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        lines.append(f"| {variant} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def floors_of(run_dir: Path, options: argparse.Namespace) -> Figures:
    """Return how far vanilla's texts agree with themselves."""
    vanilla = json.loads((run_dir / "results.json").read_text())[0]
    floors = {"agreement": vanilla["agreement"], "identical": vanilla["identical_texts"]}
    if options.second_engine:
        import yaml

        config = yaml.safe_load(options.config.read_text())
        checkpoint = base_checkpoint(config["base_model"])
        rollouts = RolloutSettings(**config["data"]["init_args"].get("rollouts", {}))
        settings = EvaluationSettings(num_runs=1, **config.get("evaluation", {}))
        _, tasks = split_benchmark(config["benchmark"], rollouts)
        method = Method(
            label="vanilla",
            agent=load_agent("vanilla", {"style": rollouts.style}),
            checkpoint=checkpoint,
            vocabulary=LatentVocabulary.load(vocabulary_path(run_dir)),
        )
        benchmark = load_benchmark(config["benchmark"])
        course = Course(benchmark=benchmark, identity=benchmark_identity(config["benchmark"]))
        runs = []
        for name in ("vllm", options.second_engine):
            chosen = EvaluationSettings(**{**vars(settings), "engine": name})
            folder = options.out / f"vanilla-{name}"
            with open_engine(chosen) as engine:
                runs.append(evaluate_method(method, course, tasks, folder, chosen, engine))
        row = result_row(runs[1], runs[0], benchmark.name)
        floors |= {
            "engines agree": row["agreement"],
            "identical in engines": row["identical_texts"],
        }
    return floors


if __name__ == "__main__":
    main()
