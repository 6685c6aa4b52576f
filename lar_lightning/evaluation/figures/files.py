"""The paper's figures from our runs: the abstraction curve (Fig. 2) and one episode (Fig. 3).

Each is written as PNG and SVG; for a page, curves are SVG in the page's colours and the episode is
text.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lar_lightning.artefacts import replacing
from lar_lightning.evaluation.figures.abstraction import AbstractionCurve
from lar_lightning.evaluation.figures.case import Case, case_html
from lar_lightning.evaluation.figures.case_drawing import draw_case
from lar_lightning.evaluation.plots import COLOURS, STYLE, page_svg

LIGHT = {"muted": "#666b73", "hair": "#e2dfd6", "behaviour": "#3a6ea5", "latent": "#c8701a"}
"""The page's light colours, for files of their own."""
PHASES = (("I", "hair", 0.35), ("II", "behaviour", 0.14), ("III", "latent", 0.16))
"""Numeral, colour and opacity: up to the peak, up to the boundary, beyond."""
MOST_COLUMNS = 3
CURVE_CAPTION = (
    "Score against the share of action tokens inside latents, in the trajectories that these were "
    "mined from. Faint lines are seeds, the strong "
    "one is their mean with the 95 % bootstrap interval over tasks. Phase I leads up to the best "
    "score, phase II up to the boundary (dashed): the largest rate whose score is not "
    "significantly below the best at smaller rates; phase III lies beyond."
)


@dataclass(frozen=True, kw_only=True)
class PageFigure:
    """A figure as a part of a page."""

    title: str
    html: Markup
    """Escaped: safe to put on a page as it is."""
    caption: str


def write_curves(folder: Path, curves: Sequence[AbstractionCurve]) -> list[Path]:
    """Write Fig. 2 as PNG and SVG, one panel a curve."""
    with _style(LIGHT, "abstraction"):
        return _write(Path(folder), "figure2", draw_curves(curves, LIGHT))


def write_case(folder: Path, case: Case) -> list[Path]:
    """Write Fig. 3 as PNG and SVG."""
    # Hinting rounds the width of characters, and text would drift off its blocks.
    with matplotlib.rc_context({"svg.hashsalt": "case", "text.hinting": "none"}):
        return _write(Path(folder), "figure3", draw_case(case))


def curves_on_page(curves: Sequence[AbstractionCurve]) -> PageFigure:
    """Return Fig. 2 for a page, in its colours."""
    with _style(COLOURS, "abstraction"):
        drawing = page_svg(draw_curves(curves, COLOURS))
    return PageFigure(title="Abstraction boundary", html=drawing, caption=CURVE_CAPTION)


def case_on_page(case: Case) -> PageFigure:
    """Return Fig. 3 for a page, as text."""
    return PageFigure(
        title=f"One episode: {case.task_id}",
        html=case_html(case),
        caption=f"Latents are coloured, the deeper the more tokens they stand for. {case.reason}",
    )


def draw_curves(curves: Sequence[AbstractionCurve], palette: Mapping[str, str]) -> Figure:
    """Draw one panel a curve."""
    if not curves:
        raise ValueError("`curves` must hold at least one curve, got none.")
    num_columns = min(len(curves), MOST_COLUMNS)
    num_rows = -(-len(curves) // num_columns)
    figure = Figure(figsize=(4.6 * num_columns, 3.4 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes, curve in zip(grid.flat, curves, strict=False):
        _draw_curve(axes, curve, palette)
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    return figure


def _draw_curve(axes: Axes, curve: AbstractionCurve, palette: Mapping[str, str]) -> None:
    for points in curve.by_seed.values():
        rates, scores = zip(*points, strict=True)
        axes.plot(rates, [100 * s for s in scores], color=palette["muted"], linewidth=1, alpha=0.4)
    lows, highs = zip(*curve.intervals, strict=True)
    axes.fill_between(
        curve.rates,
        [100 * low for low in lows],
        [100 * high for high in highs],
        color=palette["behaviour"],
        alpha=0.18,
        linewidth=0,
    )
    means = [100 * mean for mean in curve.means]
    axes.plot(curve.rates, means, color=palette["behaviour"], marker="o")
    _draw_phases(axes, curve, palette)
    axes.set_title(curve.name, fontsize=11, color=palette["muted"], pad=16, parse_math=False)
    axes.set_xlabel("reparameterization rate, as mined")
    axes.set_ylabel("score (%)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _draw_phases(axes: Axes, curve: AbstractionCurve, palette: Mapping[str, str]) -> None:
    first, last = curve.rates[0], curve.rates[-1]
    pad = 0.03 * (last - first) or 0.01
    edges = (first - pad, curve.peak, curve.boundary, last + pad)
    axes.set_xlim(edges[0], edges[-1])
    has_collapse = curve.boundary < last
    if not has_collapse:
        edges = (*edges[:2], last + pad, last + pad)
    for (numeral, colour, opacity), start, end in zip(PHASES, edges, edges[1:], strict=False):
        if end - start < 1e-9:
            continue
        axes.axvspan(start, end, color=palette[colour], alpha=opacity, linewidth=0, zorder=0)
        if end - start > 0.05 * (edges[-1] - edges[0]):
            axes.annotate(
                numeral,
                ((start + end) / 2, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                color=palette["muted"],
                fontsize=9,
            )
    if has_collapse:
        axes.axvline(curve.boundary, color=palette["latent"], linewidth=1.4, linestyle=(0, (4, 3)))
        is_right = curve.boundary > (first + last) / 2
        axes.annotate(
            f"boundary {curve.boundary:.2f}",
            (curve.boundary, 0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-5 if is_right else 5, 6),
            textcoords="offset points",
            ha="right" if is_right else "left",
            color=palette["latent"],
            fontsize=9,
        )


def _style(palette: Mapping[str, str], name: str) -> AbstractContextManager[None]:
    names = {placeholder: variable for variable, placeholder in COLOURS.items()}
    style: dict[Any, Any] = {
        key: palette[names[value]] if value in names else value for key, value in STYLE.items()
    }
    return matplotlib.rc_context({**style, "svg.hashsalt": name})


def _write(folder: Path, name: str, figure: Figure) -> list[Path]:
    paths = []
    formats: dict[str, Callable[[Path], None]] = {
        "png": lambda path: figure.savefig(path, format="png", dpi=200, facecolor="white"),
        "svg": lambda path: figure.savefig(
            path, format="svg", facecolor="white", metadata={"Date": None}
        ),
    }
    for suffix, save in formats.items():
        paths.append(folder / f"{name}.{suffix}")
        with replacing(paths[-1]) as temporary:
            save(temporary)
    return paths
