"""What a run folder holds, as W&B artefacts with lineage, tables, summary and media.

A W&B run reads the trajectories and makes the latent vocabulary, the exported model and the
results. Files are not copied: until they are uploaded, they must stay where they are.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lar_lightning.run_folder import export_path, vocabulary_path
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tracking.tracked_run import STEP_METRIC

if TYPE_CHECKING:
    from wandb import Artifact, Run

LOWER_IS_BETTER = frozenset({"val/loss_nats", "val/loss_against_start", "val/units_per_token"})
RESULT_KEYS = (
    "score",
    "generated_units",
    "expanded_tokens",
    "units_per_expanded_token",
    "adoption_rate",
    "prompt_tokens",
    "expanded_tokens_per_second",
    "agreement",
)
"""Of `results.json`; each becomes `results/<method>/<key>` in the summary."""


def log_inputs(run: "Run", run_dir: Path) -> None:
    """Log what training reads and what mining made of it."""
    trajectories = sorted((run_dir / "trajectories").glob("*.jsonl"))
    if trajectories:
        use(run, artefact(run, "trajectories", "dataset", trajectories))
    path = vocabulary_path(run_dir)
    if not path.exists():
        return
    vocabulary = LatentVocabulary.load(path)
    facts = {"num_latents": len(vocabulary), "base_size": vocabulary.base_size}
    files = [path, *(run_dir / f"mining_report.{suffix}" for suffix in ("json", "html"))]
    made = artefact(run, "latent-vocabulary", "latent-vocabulary", files, facts)
    run.log_artifact(made)
    run.log({"latents/vocabulary": vocabulary_table(vocabulary)})


def log_export(run: "Run", run_dir: Path) -> bool:
    """Log the served checkpoint, if there is one."""
    files = sorted(file for file in export_path(run_dir).rglob("*") if file.is_file())
    if files:
        run.log_artifact(artefact(run, "export", "model", files))
    return bool(files)


def log_results(run: "Run", run_dir: Path) -> bool:
    """Log what `evaluate` found, if it has been there: files, table and summary."""
    path = run_dir / "results.json"
    if not path.exists():
        return False
    rows: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    files = [path, run_dir / "results.md", *sorted((run_dir / "evaluation").glob("*"))]
    run.log_artifact(artefact(run, "results", "evaluation", files))
    columns = ["method", "num_tasks", "num_runs", *RESULT_KEYS]
    cells = [[row.get(column) for column in columns] for row in rows]
    run.log({"results/methods": _table(columns, cells)})
    for row in rows:
        run.summary.update(
            {f"results/{row['method']}/{key}": row[key] for key in RESULT_KEYS if key in row}
        )
        if row["method"] == "lar" and "units_per_expanded_token" in row:
            run.summary["results/saved_by_latents"] = 1 - row["units_per_expanded_token"]
    return True


def log_page(run: "Run", page: Path) -> None:
    """Log the page about the run: as a panel of its own, and as a file."""
    import wandb

    run.log({"report/page": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
    run.log_artifact(artefact(run, "report", "report", [page]))


def log_curves(run: "Run", curves: Mapping[str, Mapping[int, float]]) -> None:
    """Log metrics that are in the CSV log alone, or may be."""
    steps = sorted({step for values in curves.values() for step in values})
    for step in steps:
        found = {name: values[step] for name, values in curves.items() if step in values}
        run.log({**found, STEP_METRIC: step})


def summarize(run: "Run", curves: Mapping[str, Mapping[int, float]]) -> None:
    """Put each validation metric's first and best value beside its last, over all of a run's lives.

    The curves are those of the CSV logs: offline, W&B itself forgets what was before a resume.
    """
    for name, values in curves.items():
        if not name.startswith("val/") or not values:
            continue
        best = min if name in LOWER_IS_BETTER or name.endswith("_nats") else max
        run.summary.update(
            {
                name: values[max(values)],
                f"start/{name}": values[min(values)],
                f"best/{name}": best(values.values()),
            }
        )


def vocabulary_table(vocabulary: LatentVocabulary) -> Any:
    """Return the latents as a W&B table."""
    columns = ["id", "text", "num_tokens", "num_occurrences", "support", "inner_entropy"]
    rows: list[list[Any]] = [
        [
            vocabulary.base_size + index,
            latent.text,
            len(latent.segment),
            latent.num_occurrences,
            latent.support,
            latent.inner_entropy,
        ]
        for index, latent in enumerate(vocabulary.latents)
    ]
    return _table(columns, rows)


def _table(columns: Any, rows: Any) -> Any:
    import wandb

    return wandb.Table(columns=columns, data=rows)


def artefact(
    run: "Run",
    name: str,
    kind: str,
    files: Iterable[Path],
    facts: Mapping[str, Any] | None = None,
) -> "Artifact":
    """Return an artefact of files where they lie; those that are missing are left out.

    Args:
        run: Whose id the name gets: a project holds many runs.
        name: Of the artefact.
        kind: Its type in W&B.
        files: Of one folder, or of folders beside each other.
        facts: Shown beside it.
    """
    import wandb

    there = [file for file in files if file.is_file()]
    made = wandb.Artifact(f"{name}-{run.id}", kind, metadata=dict(facts or {}))
    for file in there:
        folder = "" if file.parent == there[0].parent else f"{file.parent.name}/"
        made.add_file(
            str(file.resolve()), name=folder + file.name, policy="immutable", skip_cache=True
        )
    return made


def use(run: "Run", made: "Artifact") -> None:
    """Log an artefact as what the run has read.

    Online, W&B has a call for it. Offline it refuses that call, although its files can hold the
    same; where a version of W&B cannot, the artefact is logged as any other.
    """
    log: Callable[..., Any] | None = getattr(run, "_log_artifact", None)
    if not run.offline:
        run.use_artifact(made)
    elif log is None:
        run.log_artifact(made)
    else:
        log(made, aliases=["latest"], is_user_created=True, use_after_commit=True)
