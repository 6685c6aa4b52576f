"""Training curves of a run: read from its logs, drawn as SVG in the colours of the page around it.

Figures are drawn in placeholder colours, which become CSS variables afterwards: one drawing serves
light and dark.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Curves = dict[str, dict[int, float]]
"""Values of each metric by step, in the order of steps."""

COLOURS = {"muted": "#010103", "hair": "#010104", "behaviour": "#010105", "latent": "#010106"}
"""CSS variable of the page -> placeholder in the drawing."""

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "svg.fonttype": "none",
    "axes.edgecolor": COLOURS["hair"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["hair"],
    "xtick.color": COLOURS["hair"],
    "ytick.color": COLOURS["hair"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing with what is needed to read it."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...]
    """CSS variable of the colour, and what it stands for."""
    caption: str


def read_curves(logs: Path) -> Curves:
    """Merge the CSV logs of all versions of a run.

    A version that resumes, or trains anew, replaces what earlier ones logged from its first step.
    At that step itself what it does not log again is kept: it was counted behind the last step that
    it goes on from.

    Args:
        logs: Folder with `version_*/metrics.csv`.
    """
    merged: Curves = {}
    for path in sorted(logs.glob("version_*/metrics.csv"), key=_version):
        curves = _read_version(path)
        steps = [step for values in curves.values() for step in values if step > 0]
        first = min(steps, default=math.inf)
        for values in merged.values():
            for step in [step for step in values if step > first]:
                del values[step]
        for name, values in curves.items():
            merged.setdefault(name, {}).update(values)
    return {name: dict(sorted(values.items())) for name, values in merged.items() if values}


def _version(path: Path) -> tuple[int, str]:
    number = path.parent.name.removeprefix("version_")
    return (int(number) if number.isdecimal() else -1, number)


def _read_version(path: Path) -> Curves:
    curves: Curves = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            if step is None:
                continue
            for name, text in row.items():
                value = _number(text)
                if name and name != "step" and value is not None:
                    curves.setdefault(name, {})[int(step)] = value
    return curves


def _number(text: object) -> float | None:
    """Read a finite number; a torn last line of a killed run has none in some cells."""
    try:
        value = float(text) if isinstance(text, str) else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Average over the last `window` values, or as many as there are."""
    totals = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return ((totals[ends] - totals[starts]) / (ends - starts)).tolist()


def training_plots(curves: Curves) -> list[Plot]:
    """Draw what the logs hold: training loss by terms, held-out loss, agreement and adoption."""
    plots = [_loss_plot(curves), _held_out_plot(curves), _behaviour_plot(curves)]
    return [plot for plot in plots if plot is not None]


def _loss_plot(curves: Curves) -> Plot | None:
    folded, split = curves.get("train/folded_nats", {}), curves.get("train/split_nats", {})
    steps = [step for step in folded if step in split]
    if len(steps) < 2:
        return None
    window = max(len(steps) // 15, 1)
    below = running_mean([folded[step] for step in steps], window)
    above = running_mean([split[step] for step in steps], window)

    def draw(axes: Axes) -> None:
        totals = [folded[step] + split[step] for step in steps]
        colours = [COLOURS["behaviour"], COLOURS["latent"]]
        axes.stackplot(steps, below, above, colors=colours, alpha=0.75, linewidth=0)
        if window > 1:
            axes.plot(steps, totals, color=COLOURS["muted"], linewidth=0.8, alpha=0.6)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
        axes.set_ylabel("nats per row")

    mean = (
        f"Means over {window} logged values; the line is their sum, unsmoothed. "
        if window > 1
        else ""
    )
    return Plot(
        title="Training loss",
        svg=_svg(draw, "training-loss"),
        legend=(("latent", "split: latent or explicit?"), ("behaviour", "folded: which text?")),
        caption=f"{mean}Folded is behaviour, split is adoption; together they are the divergence "
        "from the base model.",
    )


def _held_out_plot(curves: Curves) -> Plot | None:
    losses = curves.get("val/loss_nats", {})
    if not losses:
        return None
    start = losses.get(0)

    def draw(axes: Axes) -> None:
        if start is not None:
            axes.axhline(start, color=COLOURS["muted"], linewidth=1.2, linestyle=(0, (2, 3)))
        axes.plot(*_points(losses), color=COLOURS["behaviour"], marker="o")
        axes.set_ylim(0, max(losses.values()) * 1.15)
        axes.set_ylabel("nats per row")

    dotted = "The dotted line is the loss before the first step." if start is not None else ""
    return Plot(
        title="Held-out loss",
        svg=_svg(draw, "held-out-loss"),
        legend=(("behaviour", "folded + split, held-out trajectories"),),
        caption=f"Lower is nearer to the base model. {dotted}".strip(),
    )


def _behaviour_plot(curves: Curves) -> Plot | None:
    agreement, adoption = (
        curves.get("val/row_agreement", {}),
        curves.get("val/expected_adoption", {}),
    )
    if not agreement and not adoption:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(*_points(agreement), color=COLOURS["behaviour"], marker="o")
        axes.plot(*_points(adoption), color=COLOURS["latent"], marker="o")
        axes.set_ylim(0, 1.04)
        axes.set_ylabel("share")

    return Plot(
        title="Agreement and adoption",
        svg=_svg(draw, "behaviour"),
        legend=(("behaviour", "rows that agree"), ("latent", "expected adoption")),
        caption="Rows whose likeliest token is the base model's; probability of the latent "
        "where one is due.",
    )


def _points(values: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(values), list(values.values())


def _svg(draw: Callable[[Axes], None], name: str) -> Markup:
    """Draw one pair of axes over steps; the result refers to nothing outside the page."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        return page_svg(figure)


def page_svg(figure: Figure) -> Markup:
    """Return a figure drawn in placeholder colours as SVG for a page; call within its style."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL
    )
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for variable, placeholder in COLOURS.items():
        text = text.replace(placeholder, f"var(--{variable})")
    return Markup(text)  # holds nothing but numbers and our own labels
