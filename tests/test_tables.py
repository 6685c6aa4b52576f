import json
import re

import pytest
from made_up_grid import draw_grid, make_episode, make_run, mind2web_groups

from lar_lightning.evaluation.results.rows import Row, grid_rows
from lar_lightning.evaluation.tables.formats import (
    Cell,
    Table,
    TableRow,
    latex_escaped,
    to_json,
    to_latex,
    to_markdown,
)
from lar_lightning.evaluation.tables.names import (
    benchmark_name,
    distinct_names,
    in_order,
    method_name,
)
from lar_lightning.evaluation.tables.notes import count_note, failure_notes
from lar_lightning.evaluation.tables.paper import (
    TABLE_1,
    group_number,
    main_number,
    paper_backbone,
    transfer_number,
)
from lar_lightning.evaluation.tables.paper_tables import (
    all_tables,
    group_tables,
    main_table,
    transfer_tables,
    write_tables,
)

QWEN, LLAMA = "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return grid_rows(draw_grid(), groups=mind2web_groups())


def line_of(table: Table, backbone: str, method: str) -> dict[str, Cell]:
    index = next(i for i, row in enumerate(table.rows) if row.labels == (backbone, method))
    return dict(zip(table.columns, table.rows[index].cells, strict=True))


def paper_line(table: Table, backbone: str, method: str) -> dict[str, Cell]:
    index = next(i for i, row in enumerate(table.rows) if row.labels == (backbone, method))
    row = table.rows[index + 1]
    assert row.is_reference
    return dict(zip(table.columns, row.cells, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen3-8B",
        "qwen3-8b",
        "/models/Qwen3-8B/",
        "~/.cache/hub/models--Qwen--Qwen3-8B/snapshots/0a1b",
    ],
)
def test_a_backbone_is_known_by_any_of_its_names(name: str) -> None:
    assert paper_backbone(name) == paper_backbone("Qwen3-8B") is not None


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B-AWQ", "Qwen/Qwen3-4B", "Llama-3.1-8B", ""]
)
def test_another_model_is_not_the_papers_backbone(name: str) -> None:
    assert paper_backbone(name) is None
    assert main_number(name, "lar", "triviaqa") is None


def test_llama_has_two_names() -> None:
    assert paper_backbone("Meta-Llama-3.1-8B-Instruct") == paper_backbone(LLAMA) is not None


def test_the_papers_numbers_are_found() -> None:
    found = main_number(QWEN, "LAR", "TriviaQA?path=tasks.jsonl")
    assert found is not None
    assert (found.score, found.change) == (80.09, -27.06)
    assert main_number(QWEN, "react", "mind2web") is None
    assert main_number(QWEN, "lar", "humaneval") is None
    transferred = transfer_number(LLAMA, "lar", "mbpp", learned_on="kodcode")
    assert transferred is not None
    assert transferred.score == 46.60
    assert transfer_number(LLAMA, "lar", "mbpp", learned_on="humaneval") is None
    for group in ("cross_website", "Cross-Website", "test_website"):
        number = group_number(QWEN, "lar", "mind2web", group)
        assert (number.score if number else None) == (None if "test" in group else 26.37)
    assert group_number(QWEN, "lar", "bfcl", "cross_website") is None


def test_the_papers_table_is_whole() -> None:
    assert len(TABLE_1) == 14
    assert sum(map(len, TABLE_1.values())) == 2 * (6 * 3 + 2)


def test_best_of_ours_is_bold_and_the_papers_numbers_stand_below(rows: list[Row]) -> None:
    table = main_table(rows)
    assert table.columns == ("TriviaQA", "KodCode", "Mind2Web", "HumanEval")
    methods = [row.labels[1] for row in table.rows if row.labels[0] == "Qwen3-8B"]
    ours = [method for method in methods if method != "paper"]
    assert ours == ["Vanilla", "CoT", "ReAct", "ACON", "LAR"]
    for column in table.columns:
        cells = [line_of(table, "Qwen3-8B", method)[column] for method in ours]
        scores = [cell.value["score"] for cell in cells if cell.value]
        best = [cell.value["score"] for cell in cells if cell.is_best]
        assert set(best) == {max(scores)}
    assert paper_line(table, "Qwen3-8B", "LAR")["KodCode"].text == "58.28"
    assert paper_line(table, "Qwen3-8B", "LAR")["KodCode"].below == "\u22129.2\u00a0%"
    assert not any(cell.is_best for row in table.rows if row.is_reference for cell in row.cells)


def test_change_of_action_tokens_is_given_for_all_but_vanilla(rows: list[Row]) -> None:
    table = main_table(rows)
    assert line_of(table, "Qwen3-8B", "Vanilla")["TriviaQA"].below == ""
    lar = line_of(table, "Qwen3-8B", "LAR")["TriviaQA"]
    assert lar.below.startswith("\u2212")
    assert lar.value["action_tokens_change"] < 0


def test_missing_cells_are_dashes_and_listed(rows: list[Row]) -> None:
    table = main_table(rows, [(QWEN, "triviaqa", "tokenskip")])
    assert line_of(table, "Qwen3-8B", "ReAct")["Mind2Web"].text == "-"
    assert "Qwen3-8B, ReAct: Mind2Web" in table.missing
    assert "Qwen3-8B, TokenSkip: all" in table.missing
    assert "Qwen3-8B, ReAct: Mind2Web" in to_markdown(table)


def test_cells_learned_on_another_benchmark_are_told_apart_from_missing_ones(
    rows: list[Row],
) -> None:
    asked = [row for row in rows if row["learned_on"] != "kodcode" or row["benchmark"] != "kodcode"]
    transferred = [row for row in asked if row["method"] != "lar" or row["learned_on"]]
    table = main_table(transferred, [(QWEN, "humaneval", "lar"), (QWEN, "triviaqa", "lar")])
    assert line_of(table, "Qwen3-8B", "LAR")["HumanEval"].text == "-"
    (note,) = [note for note in table.notes if "Table 2" in note]
    assert note == "Learned on another benchmark, and in Table 2: Qwen3-8B, LAR: HumanEval."
    (missing,) = [cells for cells in table.missing if cells.startswith("Qwen3-8B, LAR")]
    assert "TriviaQA" in missing
    assert "HumanEval" not in missing


def test_significance_is_marked_where_the_test_says_so() -> None:
    def run_of(method: str, num_solved: int):
        episodes = [make_episode(f"t{i}", is_success=i < num_solved) for i in range(20)]
        return make_run(episodes, method=method)

    marked = main_table(grid_rows([run_of("vanilla", 4), run_of("lar", 10)]))  # p = 2 / 2**6
    plain = main_table(grid_rows([run_of("vanilla", 5), run_of("lar", 10)]))  # p = 2 / 2**5
    assert line_of(marked, "Qwen3-8B", "LAR")["TriviaQA"].marks == "\u2020"
    assert line_of(plain, "Qwen3-8B", "LAR")["TriviaQA"].marks == ""
    assert any("McNemar" in note for note in marked.notes)
    assert not any("McNemar" in note for note in plain.notes)


def test_transfer_is_apart_from_what_was_learned_at_home(rows: list[Row]) -> None:
    (table,) = transfer_tables(rows)
    assert table.name == "table2"
    assert table.columns == ("HumanEval", "KodCode")
    assert {row.labels[1] for row in table.rows} == {"ReAct", "LAR", "paper"}
    transferred = next(row for row in rows if row["learned_on"] == "kodcode")
    lar = line_of(table, "Qwen3-8B", "LAR")
    assert lar["HumanEval"].value["score"] == transferred["score"]
    assert lar["KodCode"].text != "-"
    assert paper_line(table, "Qwen3-8B", "LAR")["HumanEval"].text == "91.46"
    assert line_of(main_table(rows), "Qwen3-8B", "LAR")["HumanEval"].text == "-"


def test_latents_learned_jointly_are_at_home_in_each_benchmark() -> None:
    run = make_run([make_episode()], method="lar", benchmark="mbpp", learned_on="mbpp+humaneval")
    rows = grid_rows([run])
    assert main_table(rows).rows[0].cells[0].text == "100.00"
    assert transfer_tables(rows) == []


def test_parts_of_mind2web_are_table_three(rows: list[Row]) -> None:
    (table,) = group_tables(rows)
    assert table.name == "table3"
    assert table.columns == ("Cross-Task", "Cross-Website", "Cross-Domain")
    assert paper_line(table, "Qwen3-8B", "Vanilla")["Cross-Website"].text == "17.58"


def test_notes_say_what_numbers_rest_on_and_what_failed(rows: list[Row]) -> None:
    assert "60 tasks, 1 to 3 seeds, 2 to 6 runs a cell" in count_note(rows)
    (note,) = failure_notes(rows)
    assert "ACON 6 of 120 (6 \u00d7 the environment gave no answer in 60 s)" in note
    assert "more cells" in note
    assert failure_notes([row for row in rows if row["method"] == "lar"]) == []


def test_all_formats_are_written_and_hold_the_same_cells(tmp_path, rows: list[Row]) -> None:
    paths = write_tables(tmp_path, rows)
    names = {path.stem for path in paths}
    assert {"rows", "table1", "table2", "table3", "long-score", "long-time"} <= names
    for table in all_tables(rows):
        stored = json.loads((tmp_path / f"{table.name}.json").read_text("utf-8"))
        assert stored == json.loads(json.dumps(to_json(table)))
        markdown = (tmp_path / f"{table.name}.md").read_text("utf-8").splitlines()
        body = [line for line in markdown if line.startswith("| ")]
        assert len(body) == len(table.rows) + 2
        assert {line.count("|") for line in body} == {
            len(table.label_columns) + len(table.columns) + 1
        }
    assert json.loads((tmp_path / "rows.json").read_text("utf-8")) == rows


def test_latex_has_whole_lines_and_balanced_braces(rows: list[Row]) -> None:
    for table in all_tables(rows):
        text = to_latex(table)
        assert text.isascii()
        lines = [line for line in text.splitlines() if line.endswith(r"\\")]
        num_columns = len(table.label_columns) + len(table.columns)
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {num_columns - 1}
        body = "\n".join(text.splitlines()[1:]).replace("{%", "{")
        bare = re.sub(r"\\[{}]", "", body)
        assert bare.count("{") == bare.count("}")
        assert not re.search(r"(?<!\\)[%#]", body)
        for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
            assert rule in text


def test_names_of_users_are_escaped() -> None:
    assert latex_escaped(r"a_b & 50 % {x} \n~^") == (
        r"a\_b \& 50 \% \{x\} \textbackslash{}n\textasciitilde{}\textasciicircum{}"
    )
    row = TableRow(labels=("my|model_1", "<b>"), cells=(Cell(text="1.0", is_best=True),))
    table = Table(
        name="t", title="T", label_columns=("a", "b"), columns=("c",), rows=(row,), notes=("x|y",)
    )
    assert r"| my\|model\_1 | \<b> | **1.0** |" in to_markdown(table)


def test_columns_without_values_are_left_out(rows: list[Row]) -> None:
    def headings(chosen: list[Row]) -> set[str]:
        return {name for table in all_tables(chosen) for name in table.columns}

    assert "cost of 1000 episodes" not in headings(rows)
    priced = grid_rows([make_run([make_episode()])], prices={QWEN: (1.0, 2.0)})
    assert "cost of 1000 episodes" in headings(priced)
    assert "to Vanilla (95 %)" not in headings(priced)


def test_names_are_written_as_the_paper_does() -> None:
    assert benchmark_name("humaneval+mbpp?timeout=5") == "HumanEval + MBPP"
    assert method_name("lar", "kodcode") == "LAR (from KodCode)"
    assert method_name("my_method") == "my_method"
    assert in_order(["zz", "mbpp", "kodcode", "aa"], ["kodcode", "mbpp"]) == [
        "kodcode",
        "mbpp",
        "zz",
        "aa",
    ]
    assert distinct_names(["mbpp?a=1", "mbpp?a=2"], benchmark_name) == {
        "mbpp?a=1": "mbpp?a=1",
        "mbpp?a=2": "mbpp?a=2",
    }


def test_nothing_gives_no_tables() -> None:
    assert all_tables([]) == []
