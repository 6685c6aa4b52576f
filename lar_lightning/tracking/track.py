"""The verb `track`: what stages after training leave, under the W&B run of the folder."""

from pathlib import Path

from lar_lightning.errors import SettingError
from lar_lightning.evaluation.plots import read_curves
from lar_lightning.evaluation.report import write_report
from lar_lightning.tracking.tracked_files import (
    log_curves,
    log_export,
    log_inputs,
    log_page,
    log_results,
    summarize,
)
from lar_lightning.tracking.tracked_run import TrackedRun, read_identity
from lar_lightning.tracking.workspace import save_workspace


def track_run(
    base_model: str,
    run_dir: Path,
    project: str | None,
    entity: str | None,
    *,
    has_workspace: bool,
) -> None:
    """Log all that a run folder holds; what W&B has already, it knows by its content.

    Raises:
        SettingError: if the folder holds no run, or the workspace cannot be saved.
    """
    run_dir = Path(run_dir)
    page = write_report(base_model, run_dir)
    is_known = bool(read_identity(run_dir))
    logger = TrackedRun(save_dir=run_dir, project=project, entity=entity, job_type="track")
    run = logger.experiment
    try:
        curves = read_curves(run_dir / "logs")
        if run.offline or not is_known:  # an offline folder holds the whole run
            log_curves(run, curves)
        log_inputs(run, run_dir)
        summarize(run, curves)
        parts = {"export": log_export(run, run_dir), "results": log_results(run, run_dir)}
        log_page(run, page)
        if has_workspace and run.offline:
            raise SettingError(
                "`workspace` must be false offline, got true: W&B keeps workspaces on its server. "
                "Log in (`wandb login`), or bring the run up with `wandb sync` first."
            )
    finally:
        run.finish()
    if has_workspace:
        print(f"track: workspace {save_workspace(run.entity, run.project)}", flush=True)
    missing = [name for name, is_there in parts.items() if not is_there]
    told = f" ({', '.join(missing)} not there yet)" if missing else ""
    print(
        f"track: run {run.id} in project {run.project} has what {run_dir} holds{told}", flush=True
    )
