"""The paper's tables from our rows, with the paper's numbers beside ours (Tables 1 to 3)."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lar_lightning.artefacts import write_json, write_text
from lar_lightning.evaluation.tables.formats import (
    Cell,
    Table,
    TableRow,
    to_json,
    to_latex,
    to_markdown,
)
from lar_lightning.evaluation.tables.long_tables import long_tables
from lar_lightning.evaluation.tables.names import (
    BENCHMARKS,
    GROUPS,
    METHODS,
    backbone_name,
    benchmark_name,
    distinct_names,
    group_name,
    in_order,
    method_name,
)
from lar_lightning.evaluation.tables.notes import (
    cells_without,
    count_note,
    failure_notes,
    transfer_notes,
)
from lar_lightning.evaluation.tables.paper import (
    PaperNumber,
    group_number,
    main_number,
    transfer_number,
)
from lar_lightning.evaluation.tables.score_cells import MARKS_NOTE, paper_cell, score_cell

Row = Mapping[str, Any]
Expected = Iterable[tuple[str, str, str]]
"""Backbone, benchmark and method of cells that were asked for."""
Place = tuple[str, str, str]
"""Backbone, method, column."""


def write_tables(folder: Path, rows: Sequence[Row], expected: Expected = ()) -> list[Path]:
    """Write all tables that the rows give, each as JSON, Markdown and LaTeX, and the rows.

    Args:
        folder: Where to.
        rows: Of `grid_rows`.
        expected: Cells that were asked for; those without a row are listed as missing.

    Returns:
        What was written.
    """
    folder = Path(folder)
    paths = [folder / "rows.json"]
    write_json(paths[0], list(rows))
    for table in all_tables(rows, expected):
        contents = {".md": to_markdown(table), ".tex": to_latex(table)}
        for suffix, content in contents.items():
            paths.append(folder / f"{table.name}{suffix}")
            write_text(paths[-1], content)
        paths.append(folder / f"{table.name}.json")
        write_json(paths[-1], to_json(table))
    return paths


def all_tables(rows: Sequence[Row], expected: Expected = ()) -> list[Table]:
    """Return the tables that the rows give: main, transfer, groups, and all columns."""
    if not rows:
        return []
    return [
        main_table(rows, expected),
        *transfer_tables(rows),
        *group_tables(rows),
        *long_tables(rows),
    ]


def main_table(rows: Sequence[Row], expected: Expected = ()) -> Table:
    """Return Table 1: score and change of action tokens, by backbone, method and benchmark."""
    home = {
        (row["backbone"], row["method"], row["benchmark"]): row
        for row in sorted(
            rows, key=lambda row: not row["learned_on"]
        )  # its own comes last, and stays
        if is_home(row)
    }
    wanted = [(backbone, method, benchmark) for backbone, benchmark, method in expected]
    return _table(
        name="table1",
        title="Score in percent, and the change of action tokens against Vanilla. "
        "The best score of each backbone and benchmark is bold.",
        values=home,
        wanted=wanted,
        elsewhere={(row["backbone"], row["method"], row["benchmark"]) for row in rows}
        - home.keys(),
        order=BENCHMARKS,
        write=benchmark_name,
        score=lambda row, _: row,
        paper=main_number,
        has_change=True,
    )


def is_home(row: Row) -> bool:
    """Tell whether a method got ready on the benchmark that it plays, perhaps among others."""
    learned_on = row["learned_on"]
    return not learned_on or row["benchmark"] in learned_on.split("+")


def transfer_tables(rows: Sequence[Row]) -> list[Table]:
    """Return Table 2 for every benchmark whose latents were also tried on others."""
    sources = in_order(
        (row["learned_on"] for row in rows if row["learned_on"] and not is_home(row)), BENCHMARKS
    )
    return [_transfer_table(rows, source, len(sources) == 1) for source in sources]


def _transfer_table(rows: Sequence[Row], source: str, is_only: bool) -> Table:
    learned = [row for row in rows if row["learned_on"] == source]
    methods = {row["method"] for row in learned}
    tried = {row["benchmark"] for row in learned} | {source}
    at_home = [
        row
        for row in rows
        if not row["learned_on"]
        and row["benchmark"] in tried
        and (row["method"] == "react" or (row["method"] in methods and row["benchmark"] == source))
    ]
    chosen = [*at_home, *learned]
    return _table(
        name="table2" if is_only else f"table2-{benchmark_name(source).replace(' + ', '-')}",
        title=f"Transfer: what was learned on {benchmark_name(source)} alone, tried on other "
        "benchmarks too. Score in percent.",
        values={(row["backbone"], row["method"], row["benchmark"]): row for row in chosen},
        order=[*(name for name in BENCHMARKS if name != source), source],
        write=benchmark_name,
        score=lambda row, _: row,
        paper=lambda *place: transfer_number(*place, learned_on=source),
    )


def group_tables(rows: Sequence[Row]) -> list[Table]:
    """Return Table 3, the parts of Mind2Web, and the like for other benchmarks with parts."""
    tables = []
    for benchmark in in_order((row["benchmark"] for row in rows if row["groups"]), BENCHMARKS):
        chosen = [row for row in rows if row["benchmark"] == benchmark and is_home(row)]
        is_third = benchmark.partition("?")[0] == "mind2web"
        values = {
            (row["backbone"], row["method"], group): row
            for row in chosen
            for group in row["groups"]
        }
        tables.append(
            _table(
                name="table3" if is_third else f"groups-{benchmark_name(benchmark)}",
                title=f"Score in percent on the parts of {benchmark_name(benchmark)}.",
                values=values,
                order=GROUPS,
                write=group_name,
                score=lambda row, group: row["groups"][group],
                paper=lambda backbone, method, group, of=benchmark: group_number(
                    backbone, method, of, group
                ),
            )
        )
    return tables


def _table(
    *,
    name: str,
    title: str,
    values: Mapping[Place, Row],
    order: Iterable[str],
    write: Callable[[str], str],
    score: Callable[[Row, str], Row],
    paper: Callable[[str, str, str], PaperNumber | None],
    wanted: Iterable[Place] = (),
    elsewhere: Collection[Place] = (),
    has_change: bool = False,
) -> Table:
    places = [*values, *wanted]
    columns = in_order((column for _, _, column in places), order)
    column_names = distinct_names(columns, write)
    backbones = distinct_names((backbone for backbone, _, _ in places), backbone_name)
    lines: list[TableRow] = []
    absent: dict[tuple[str, str], list[str]] = {}
    in_others: dict[tuple[str, str], list[str]] = {}
    for backbone, label in backbones.items():
        methods = in_order((m for b, m, _ in places if b == backbone), METHODS)
        best = {
            column: max(
                score(values[backbone, method, column], column)["score"]
                for method in methods
                if (backbone, method, column) in values
            )
            for column in columns
            if any((backbone, method, column) in values for method in methods)
        }
        for method in methods:
            cells = []
            for column in columns:
                row = values.get((backbone, method, column))
                if row is None:
                    cells.append(Cell())
                    place = backbone, method, column
                    left_out = in_others if place in elsewhere else absent
                    left_out.setdefault((label, method_name(method)), []).append(
                        column_names[column]
                    )
                else:
                    scored = score(row, column)
                    cells.append(score_cell(row, scored, best[column], has_change=has_change))
            lines.append(TableRow(labels=(label, method_name(method)), cells=tuple(cells)))
            theirs = [paper(backbone, method, column) for column in columns]
            if any(theirs):
                cells = tuple(map(paper_cell, theirs))
                lines.append(TableRow(labels=(label, "paper"), cells=cells, is_reference=True))
    used = list({id(row): row for row in values.values()}.values())
    is_marked = any(cell.marks for line in lines for cell in line.cells)
    return Table(
        name=name,
        title=title,
        label_columns=("Backbone", "Method"),
        columns=tuple(column_names.values()),
        rows=tuple(lines),
        notes=(
            count_note(used),
            *([MARKS_NOTE] if is_marked else []),
            *transfer_notes(cells_without(in_others, len(columns))),
            *failure_notes(used),
        ),
        missing=tuple(cells_without(absent, len(columns))),
    )
