"""The verb `ablate`: play a grid, then write its tables, figures and page."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lar_lightning.base_models import load_tokenizer
from lar_lightning.benchmarks.sandbox import isolation_report
from lar_lightning.evaluation.figures.abstraction import AbstractionCurve, abstraction_curve
from lar_lightning.evaluation.figures.case import Case, choose_case, make_case
from lar_lightning.evaluation.figures.files import (
    case_on_page,
    curves_on_page,
    write_case,
    write_curves,
)
from lar_lightning.evaluation.grid import Cell, Grid
from lar_lightning.evaluation.grid_report import grid_report
from lar_lightning.evaluation.results.cells import CellRun
from lar_lightning.evaluation.results.rows import grid_rows
from lar_lightning.evaluation.runner import MethodRun
from lar_lightning.evaluation.tables.formats import to_markdown
from lar_lightning.evaluation.tables.names import benchmark_name
from lar_lightning.evaluation.tables.paper_tables import all_tables, write_tables
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import EvaluationSettings, GridSettings

MIN_STRENGTHS = 3
"""Of a curve of score against rate."""
BASE_MODEL = ("vanilla", "cot", "react")
"""Methods that are the base model under other instructions."""


def ablate(
    grid_dir: Path,
    backbones: dict[str, str],
    benchmarks: list[str],
    methods: dict[str, dict[str, Any] | None],
    settings: GridSettings,
    evaluation: EvaluationSettings,
    prices: dict[str, list[float]],
) -> list[dict[str, Any]]:
    """Play what is missing of a grid, write `grid_dir/results/`, and return its rows."""
    grid = Grid(
        grid_dir=Path(grid_dir),
        backbones=backbones,
        benchmarks=benchmarks,
        methods=methods,
        settings=settings,
        evaluation=evaluation,
    )
    for sentence in isolation_report():
        print(f"ablate: model-written code is not fully isolated here: {sentence}", flush=True)
    return write_results(grid, grid.play(), prices)


def write_results(
    grid: Grid, cells: Sequence[Cell], prices: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Write tables, figures and the page of a grid that is played; return the rows."""
    folder = grid.grid_dir / "results"
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for cell in cells:
        groups[cell.benchmark] |= cell.groups
    runs = [run for cell in cells for run in cell_runs(cell)]
    rows = grid_rows(runs, groups=groups, prices=prices)
    curves, cases = make_curves(cells), make_cases(cells)
    expected = [
        (backbone, benchmark, label.partition("@")[0])
        for backbone in grid.backbones
        for benchmark in dict.fromkeys(grid.part(text).benchmark.name for text in grid.benchmarks)
        for label in grid.methods
    ]
    write_tables(folder, rows, expected)
    figures = []
    if curves:
        write_curves(folder, curves)
        figures.append(curves_on_page(curves))
    for name, case in cases.items():
        write_case(folder / name, case)
        figures.append(case_on_page(case))
    page = grid_report(folder, rows, figures, expected)
    print(to_markdown(all_tables(rows)[0]), flush=True)
    print(f"ablate: wrote {page}, and its tables and figures beside it", flush=True)
    return rows


def cell_runs(cell: Cell) -> list[CellRun]:
    """Return the runs of a cell as tables take them."""
    name, _, _ = cell.method.partition("@")
    return [
        CellRun(
            backbone=cell.backbone,
            benchmark=cell.benchmark,
            method=name,
            learned_on=cell.trained_on,
            seed=cell.seed,
            run=run.run,
            episodes=run.episodes,
            wall_clock_seconds=run.wall_clock_seconds,
            reparameterization_rate=reparameterization_rate(run)
            if cell.prepared.latent_vocabulary
            else None,
            mined_rate=cell.prepared.mined_rate,
        )
        for run in cell.runs
    ]


def reparameterization_rate(run: MethodRun) -> float:
    """Return the share of played action tokens that latents stand for."""
    num_expanded = sum(episode.num_expanded_tokens for episode in run.episodes)
    num_explicit = sum(len(episode.units) - episode.num_latents for episode in run.episodes)
    return 1 - num_explicit / num_expanded if num_expanded else 0.0


def make_curves(cells: Sequence[Cell]) -> list[AbstractionCurve]:
    """Return a curve for each backbone and benchmark that LAR played at several strengths.

    It begins at rate 0 with the base model under the same instructions, where that has played.
    """
    places: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        if not cell.trained_on:
            places[cell.backbone, cell.benchmark].append(cell)
    curves = []
    for (backbone, benchmark), there in places.items():
        strengths = [cell for cell in there if cell.prepared.agent.name == "lar"]
        styles = {_style(cell) for cell in strengths}
        base = [
            cell
            for cell in there
            if cell.prepared.agent.name in BASE_MODEL and _style(cell) in styles
        ]
        by_method: dict[str, list[CellRun]] = defaultdict(list)
        for cell in (*base, *strengths):
            by_method[cell.method] += cell_runs(cell)
        if len({cell.method for cell in strengths}) >= MIN_STRENGTHS:
            curves.append(
                abstraction_curve(f"{benchmark_name(benchmark)}, {backbone}", by_method.values())
            )
    return curves


def _style(cell: Cell) -> str:
    return getattr(cell.prepared.agent, "style", "")


def make_cases(cells: Sequence[Cell]) -> dict[str, Case]:
    """Return an example for each backbone and benchmark that Vanilla and LAR have played."""
    cases: dict[str, Case] = {}
    vanilla = {
        (cell.backbone, cell.benchmark): cell
        for cell in cells
        if cell.prepared.agent.name == "vanilla"
    }
    for cell in cells:
        name = f"{cell.backbone}-{cell.benchmark}"
        other = vanilla.get((cell.backbone, cell.benchmark))
        path = cell.prepared.latent_vocabulary
        if other is None or path is None or name in cases:
            continue
        left, right = (
            {episode.task_id: episode for episode in shown.runs[0].episodes}
            for shown in (other, cell)
        )
        try:
            task_id, reason = choose_case(left, right)
        except ValueError:
            continue
        cases[name] = make_case(
            load_tokenizer(cell.prepared.checkpoint),
            LatentVocabulary.load(path),
            left[task_id],
            right[task_id],
            reason,
        )
    return cases
