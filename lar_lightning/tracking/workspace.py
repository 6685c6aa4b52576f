"""The workspace in which W&B shows our runs: which panels, in which order."""

from importlib import import_module
from typing import Any

from lar_lightning.errors import SettingError
from lar_lightning.tracking.tracked_run import STEP_METRIC

NAME = "Latent actions"
PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "Horizon": {
        "Units per token (held out)": ("val/units_per_token",),
        "Horizon before and after": ("val/horizon_tokens", "val/horizon_units"),
        "Expected adoption": ("val/expected_adoption",),
    },
    "Behaviour": {
        "Divergence (held out)": ("val/loss_nats", "val/folded_nats", "val/split_nats"),
        "Rows that agree": ("val/row_agreement",),
        "Loss against its start": ("val/loss_against_start",),
    },
    "Training": {
        "Loss": ("train/loss_nats",),
        "Terms of the loss": ("train/folded_nats", "train/split_nats"),
        "Sampled targets": ("train/sampled_share",),
    },
}
"""Section -> title of a panel -> the metrics that it draws over training steps."""
RESULTS = {
    "Units per expanded token": "results/lar/units_per_expanded_token",
    "Score of LAR": "results/lar/score",
    "Score of vanilla": "results/vanilla/score",
    "Agreement with vanilla": "results/lar/agreement",
}
"""Title -> number of the summary, one panel each."""
MEDIA = ("report/page",)
"""The page of the verb `report`."""


def workspace(entity: str, project: str) -> Any:
    """Return the workspace of a project, as the package has it; nothing is saved.

    Raises:
        SettingError: if the package that describes workspaces is missing.
    """
    try:
        panels: Any = import_module("wandb_workspaces.reports.v2")
        workspaces: Any = import_module("wandb_workspaces.workspaces")
    except ImportError as error:
        raise SettingError(
            "`workspace` must be false without the package wandb-workspaces, got true. Install it: "
            "pip install wandb-workspaces."
        ) from error
    results: list[Any] = [
        panels.ScalarChart(title=title, metric=panels.SummaryMetric(name))
        for title, name in RESULTS.items()
    ]
    media: list[Any] = [panels.MediaBrowser(title="Report", media_keys=list(MEDIA))]
    curves = {
        section: [
            panels.LinePlot(title=title, x=STEP_METRIC, y=list(metrics))
            for title, metrics in drawn.items()
        ]
        for section, drawn in PANELS.items()
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            workspaces.Section(name=name, panels=drawn, is_open=True)
            for name, drawn in {"Results": results, **curves, "Report": media}.items()
        ],
    )


def save_workspace(entity: str, project: str) -> str:
    """Save the workspace on W&B's server and return its address."""
    made = workspace(entity, project)
    made.save()
    return made.url
