"""Drawings of a run beside its three main curves: the boundary, and every other metric, small."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lar_lightning.evaluation.plots import COLOURS, STYLE, Plot, page_svg
from lar_lightning.evaluation.run_records import Alarm, Stage

SHOWN_ALREADY = frozenset(
    {
        *("train/folded_nats", "train/split_nats", "val/loss_nats"),
        *("val/row_agreement", "val/expected_adoption", "epoch"),
    }
)
"""Metrics with a drawing of their own."""
WIDTH, HEIGHT, PAD = 240.0, 56.0, 4.0
FLAT = 1e-3
"""Share of its size by which a metric must vary to be drawn as more than a straight line."""


@dataclass(frozen=True, kw_only=True)
class SmallPlot:
    """One metric over steps."""

    name: str
    svg: Markup
    first: float
    last: float
    lowest: float
    highest: float


def boundary_plot(stages: Sequence[Stage]) -> Plot | None:
    """Draw what each stage of `AbstractionSchedule` costs against its rate (paper 5.3)."""
    if not stages:
        return None
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "boundary"}):
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        _draw_stages(figure.add_subplot(), stages)
        svg = page_svg(figure)
    held = [stage for stage in stages if stage.holds]
    boundary = max(held, key=lambda stage: stage.rate, default=None)
    found = (
        "No stage held."
        if boundary is None
        else f"The largest executable vocabulary has {boundary.num_latents} latents: "
        f"{boundary.rate:.3f} of the action tokens lie inside them."
    )
    return Plot(
        title="Abstraction boundary",
        svg=svg,
        legend=(("behaviour", "stages that hold"), ("latent", "stages that do not")),
        caption=f"Held-out divergence against the share of action tokens inside latents. {found}",
    )


def _draw_stages(axes: Axes, stages: Sequence[Stage]) -> None:
    rates = [stage.rate for stage in stages]
    costs = [stage.nats_per_token for stage in stages]
    axes.plot(rates, costs, color=COLOURS["muted"], linewidth=1.2, zorder=1)
    for stage in stages:
        colour = COLOURS["behaviour" if stage.holds else "latent"]
        axes.plot(stage.rate, stage.nats_per_token, color=colour, marker="o", zorder=2)
        axes.annotate(
            f"{stage.num_latents}",
            (stage.rate, stage.nats_per_token),
            xytext=(7, 6),
            textcoords="offset points",
            ha="left",
            color=COLOURS["muted"],
            fontsize=9,
        )
    held = [stage.rate for stage in stages if stage.holds]
    if held and len(held) < len(stages):
        axes.axvline(max(held), color=COLOURS["latent"], linewidth=1.4, linestyle=(0, (4, 3)))
    axes.set_ylim(0, max([*costs, 1e-9]) * 1.2)
    axes.margins(x=0.08)
    axes.set_xlabel("reparameterization rate")
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def small_plots(
    curves: Mapping[str, Mapping[int, float]], alarms: Sequence[Alarm] = ()
) -> list[SmallPlot]:
    """Draw every metric that has no drawing of its own; alarms are strokes across its own curve."""
    plots = []
    for name in sorted(set(curves) - SHOWN_ALREADY):
        values = curves[name]
        if len(values) < 2:
            continue
        marks = [alarm.step for alarm in alarms if alarm.signal == name]
        plots.append(
            SmallPlot(
                name=name,
                svg=_line(values, marks),
                first=values[min(values)],
                last=values[max(values)],
                lowest=min(values.values()),
                highest=max(values.values()),
            )
        )
    return plots


def _line(values: Mapping[int, float], marks: Sequence[int]) -> Markup:
    """Return a curve without axes; it holds numbers only."""
    first, last = min(values), max(values)
    low, high = min(values.values()), max(values.values())
    is_flat = high - low <= FLAT * max(abs(low), abs(high))

    def across(step: float) -> float:
        return PAD + (WIDTH - 2 * PAD) * (step - first) / ((last - first) or 1)

    def up(value: float) -> float:
        share = 0.5 if is_flat else (value - low) / (high - low)
        return HEIGHT - PAD - (HEIGHT - 2 * PAD) * share

    points = " ".join(f"{across(step):.1f},{up(values[step]):.1f}" for step in sorted(values))
    strokes = "".join(
        f'<path class="alarm" d="M{across(step):.1f} 0V{HEIGHT:g}"/>'
        for step in marks
        if first <= step <= last
    )
    return Markup(
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" preserveAspectRatio="none" aria-hidden="true">'
        f'{strokes}<polyline points="{points}"/></svg>'
    )
