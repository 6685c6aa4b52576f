import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_grid import (
    draw_grid,
    draw_run,
    draw_strengths,
    make_episode,
    make_request,
    mind2web_groups,
)

from lar_lightning.agents import load_agent
from lar_lightning.agents.workshop import Prepared
from lar_lightning.errors import SettingError
from lar_lightning.evaluation.ablate import make_curves
from lar_lightning.evaluation.examples import Piece
from lar_lightning.evaluation.figures.abstraction import abstraction_curve, boundary
from lar_lightning.evaluation.figures.case import (
    Case,
    CaseSide,
    CaseTurn,
    case_html,
    choose_case,
    horizon,
    make_case,
)
from lar_lightning.evaluation.figures.case_drawing import COLUMNS, draw_case, lay_out
from lar_lightning.evaluation.figures.files import (
    case_on_page,
    curves_on_page,
    draw_curves,
    write_case,
    write_curves,
)
from lar_lightning.evaluation.grid import Cell
from lar_lightning.evaluation.grid_report import grid_report
from lar_lightning.evaluation.plots import COLOURS
from lar_lightning.evaluation.results.rows import grid_rows
from lar_lightning.evaluation.runner import MethodRun
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.tokenizer import encode_text, extend_tokenizer

PLATEAU = {0.0: 0.6, 0.1: 0.65, 0.2: 0.7, 0.3: 0.75, 0.4: 0.75, 0.5: 0.74, 0.6: 0.35, 0.7: 0.1}
HOSTILE = "</pre><script>alert('x')</script> $5_a$ \u202e\ud800"


def tasks_with(*shares: float, num_tasks: int = 200) -> np.ndarray:
    """At each rate the first tasks are solved: nested, as scores of one model nearly are."""
    return np.array([np.arange(num_tasks) < share * num_tasks for share in shares], dtype=float)


def test_boundary_is_the_last_rate_before_the_collapse() -> None:
    rates = [0.0, 0.2, 0.4, 0.6, 0.8]
    assert boundary(rates, tasks_with(0.5, 0.6, 0.6, 0.2, 0.1)) == 0.4
    assert boundary(rates[::-1], tasks_with(0.1, 0.2, 0.6, 0.6, 0.5)) == 0.4


def test_boundary_is_the_last_rate_where_nothing_collapses() -> None:
    assert boundary([0.1, 0.5, 0.9], tasks_with(0.5, 0.6, 0.7)) == 0.9
    assert boundary([0.1, 0.5, 0.9], tasks_with(0.5, 0.5, 0.5)) == 0.9


def test_boundary_is_the_first_rate_where_all_others_cost() -> None:
    assert boundary([0.0, 0.5, 0.9], tasks_with(0.9, 0.5, 0.3)) == 0.0
    assert boundary([0.3], tasks_with(0.5)) == 0.3


def test_a_loss_that_few_tasks_cannot_show_does_not_move_the_boundary() -> None:
    values = tasks_with(0.6, 0.5, num_tasks=10)
    assert boundary([0.0, 0.5], values) == 0.5
    assert boundary([0.0, 0.5], tasks_with(0.6, 0.5, num_tasks=500)) == 0.0


def test_a_slow_decline_is_measured_from_the_best_not_from_the_neighbour() -> None:
    shares = [0.8 - 0.015 * step for step in range(10)]
    found = boundary(list(range(10)), tasks_with(*shares, num_tasks=200))
    assert 0 < found < 4


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5, unique=True), st.integers(0, 99))
def test_boundary_is_one_of_the_rates_and_not_before_the_peak(
    rates: list[float], seed: int
) -> None:
    scores = np.random.default_rng(seed).random((len(rates), 12))
    found = boundary(rates, scores)
    assert found in rates
    assert found >= rates[int(np.argmax(scores.mean(1)))]


def test_rates_and_scores_must_pair() -> None:
    with pytest.raises(ValueError, match="pair"):
        boundary([], [])


def test_a_curve_has_its_peak_its_boundary_and_its_seeds() -> None:
    curve = abstraction_curve("TriviaQA", draw_strengths("triviaqa", PLATEAU))
    assert curve.rates == pytest.approx(tuple(PLATEAU))
    assert 0.3 <= round(curve.peak, 6) <= 0.5
    assert curve.boundary == 0.5
    assert set(curve.by_seed) == {0, 1, 2}
    for mean, (low, high) in zip(curve.means, curve.intervals, strict=True):
        assert low <= mean <= high
    seeds = [points[0][1] for points in curve.by_seed.values()]
    assert np.mean(seeds) == pytest.approx(curve.means[0])


def test_vanilla_begins_a_curve_at_rate_zero_and_strengths_are_sorted() -> None:
    vanilla = draw_run("vanilla", "triviaqa", "m", num_tasks=9)
    strengths = draw_strengths("triviaqa", {0.4: 0.5, 0.2: 0.5}, num_tasks=9)
    curve = abstraction_curve("TriviaQA", [*strengths, [vanilla], []])
    assert curve.rates == pytest.approx((0.0, 0.2, 0.4))
    with pytest.raises(ValueError, match="share at least one task"):
        abstraction_curve("TriviaQA", [[]])


def test_phases_are_shaded_and_the_boundary_is_marked_only_where_there_is_one() -> None:
    falling = abstraction_curve("a $x$ name", draw_strengths("triviaqa", PLATEAU))
    rising = abstraction_curve("b", draw_strengths("mind2web", {0.0: 0.3, 0.5: 0.5}))
    figure = draw_curves([falling, rising], COLOURS)
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts[0][-1] == "boundary 0.50"
    assert texts[0][0] == "I"
    assert texts[0][-2] == "III"
    assert texts[1] == ["I"]
    assert figure.axes[0].get_title() == "a $x$ name"


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_curves_are_written_as_png_and_svg(tmp_path) -> None:
    curves = [
        abstraction_curve(name, draw_strengths("triviaqa", PLATEAU, num_tasks=20))
        for name in ("a < b", "c", "d", "e")
    ]
    png, svg = write_curves(tmp_path, curves)
    assert is_png(png)
    text = svg.read_text("utf-8")
    ET.fromstring(text)
    assert not any(placeholder in text for placeholder in COLOURS.values())
    assert "a &lt; b" in curves_on_page(curves).html
    with pytest.raises(ValueError, match="at least one curve"):
        draw_curves([], COLOURS)


def make_side(method: str, *turns: tuple[str, str, str]) -> CaseSide:
    """Make an episode of explicit text, a latent and an observation each turn."""
    return CaseSide(
        method=method,
        turns=tuple(
            CaseTurn(
                pieces=(
                    Piece(text=explicit, kind="explicit", num_units=1, num_tokens=1),
                    Piece(text=latent, kind="latent", num_units=1, num_tokens=6),
                ),
                observation=observation,
            )
            for explicit, latent, observation in turns
        ),
        num_units=70 if method == "LAR" else 100,
        num_tokens=100,
        num_latents=2 if method == "LAR" else 0,
        is_success=True,
        detail=HOSTILE,
    )


@pytest.fixture
def case() -> Case:
    turns = (
        (f"first line\nsecond {HOSTILE} \u9996\u76f8 ", "</think>\n<search>", HOSTILE),
        ("a long answer of many words " * 9, "</answer>", ""),
    )
    sides = (make_side("Vanilla", *turns), make_side("LAR", *turns))
    return Case(task_id="triviaqa/1", reason="Chosen by rule.", sides=sides)


def test_lines_hold_all_text_within_their_columns_and_break_between_words(case: Case) -> None:
    lines = lay_out(case.sides[1], columns=40)
    widths = [sum(len(fragment.text) for fragment in line) for line in lines]
    assert max(widths) <= 40
    for line in lines:
        for left, right in pairwise(line):
            assert right.column == left.column + len(left.text)
    text = "".join(fragment.text for line in lines for fragment in line)
    assert text.count("many words ") == 9
    latents = [f.text for line in lines for f in line if f.kind == "latent"]
    assert "".join(latents) == "</think>\u21b5<search></answer>"


def test_a_word_that_is_longer_than_a_line_is_broken() -> None:
    lines = lay_out(make_side("LAR", ("x" * 95, "y", "")), columns=40)
    assert ["".join(fragment.text for fragment in line) for line in lines] == [
        "x" * 40,
        "x" * 40,
        "x" * 15 + "y",
    ]


def test_both_horizons_are_stated(case: Case) -> None:
    vanilla, lar = case.sides
    assert horizon(case, vanilla) == "100 units for 100 tokens"
    told = horizon(case, lar)
    assert told == "70 units for 100 tokens, 2 of them latents (\u221230.0\u00a0%)"
    drawn = [text.get_text() for text in draw_case(case).axes[0].texts]
    assert f"effective horizon: {told}" in drawn


def test_a_case_is_drawn_whatever_its_characters(tmp_path, case: Case) -> None:
    png, svg = write_case(tmp_path, case)
    assert is_png(png)
    ET.fromstring(svg.read_text("utf-8"))


def test_a_long_episode_is_cut_and_said_to_be() -> None:
    side = make_side("LAR", ("word\n" * 200, "latent", ""))
    figure = draw_case(Case(task_id="t", reason="", sides=(side, side)))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sum("more lines" in text for text in texts) == 2
    assert figure.get_size_inches()[1] < 14
    assert max(map(len, texts)) <= COLUMNS


class TagReader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str | None] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_a_case_on_a_page_is_escaped_and_coloured_by_length(case: Case) -> None:
    html = case_html(case)
    assert "script" not in TagReader(html).tags
    assert 'class="latent t3"' in html
    assert html.encode("utf-8")


def test_the_typical_task_is_chosen_among_those_that_both_solve() -> None:
    def episode(task: str, num_units: int, *, is_success: bool = True):
        return make_episode(task, requests=(make_request(num_units),), is_success=is_success)

    vanilla = {task: episode(task, 100) for task in "abcde"}
    lengths = {"a": 10, "b": 60, "c": 90, "d": 55}
    lar = {task: episode(task, length) for task, length in lengths.items()}
    lar["d"] = episode("d", 55, is_success=False)
    task, reason = choose_case(vanilla, lar)
    assert task == "b"
    assert "of 3 tasks that both solve" in reason
    with pytest.raises(ValueError, match="both methods"):
        choose_case(vanilla, {})


def test_a_case_is_cut_into_units_turn_by_turn(tiny_tokenizer) -> None:
    texts = ["def has_close(numbers):\n", "return <b> \u00e9"]
    text = "numbers):"
    segment = tuple(encode_text(tiny_tokenizer, text))
    vocabulary = LatentVocabulary(
        [LatentAction(segment=segment, text=text)], base_size=len(tiny_tokenizer)
    )
    requests = tuple(
        replace(make_request(), units=tuple(vocabulary.encode(encode_text(tiny_tokenizer, text))))
        for text in texts
    )
    episode = make_episode("t", requests=requests, texts=tuple(texts))
    extended = extend_tokenizer(tiny_tokenizer, vocabulary)
    vanilla, lar = make_case(extended, vocabulary, episode, episode).sides
    assert (vanilla.method, lar.method) == ("Vanilla", "LAR")
    assert ["".join(piece.text for piece in turn.pieces) for turn in lar.turns] == texts
    assert [turn.observation for turn in lar.turns] == ["seen", ""]
    assert [piece.text for piece in lar.turns[0].pieces if piece.kind == "latent"] == [text]
    assert lar.num_units == sum(len(request.units) for request in requests)


def test_the_page_holds_tables_figures_and_what_failed_and_nothing_from_outside(
    tmp_path, case: Case
) -> None:
    rows = grid_rows(draw_grid(), groups=mind2web_groups())
    curve = abstraction_curve("TriviaQA", draw_strengths("triviaqa", PLATEAU, num_tasks=20))
    figures = [curves_on_page([curve]), case_on_page(case)]
    page = grid_report(tmp_path, rows, figures).read_text("utf-8")
    reader = TagReader(page)
    assert "script" not in reader.tags
    assert all(link and link.startswith("#") for link in reader.links)
    assert reader.tags.count("table") == 3 + 4 + 1
    assert "the environment gave no answer in 60 s" in page
    assert "Effective horizon: 70 units" in page
    assert "<svg" in page
    assert "80.09" in page


def test_a_page_without_results_is_refused(tmp_path) -> None:
    with pytest.raises(SettingError, match="at least one finished cell"):
        grid_report(tmp_path, [])


def played(method: str, agent: str, *, num_solved: int, rate: float, style: str = "") -> Cell:
    settings = {"style": style} if style else {}
    episodes = tuple(
        make_episode(
            f"t{task}",
            is_success=task < num_solved,
            requests=(make_request(int(100 * (1 - rate)), expanded=100),),
        )
        for task in range(10)
    )
    return Cell(
        backbone="tiny",
        benchmark="toy",
        method=method,
        trained_on="",
        seed=0,
        runs=(MethodRun(method=method, run=0, wall_clock_seconds=1.0, episodes=episodes),),
        groups={},
        prepared=Prepared(
            agent=load_agent(agent, settings),
            checkpoint=Path("base"),
            latent_vocabulary=Path("latents.json") if agent == "lar" else None,
            mined_rate=rate if agent == "lar" else None,
        ),
    )


def test_a_curve_begins_with_the_base_model_under_the_same_instructions() -> None:
    strengths = [
        played(f"lar_{number}", "lar", num_solved=solved, rate=rate, style="react")
        for number, solved, rate in ((4, 7, 0.1), (16, 8, 0.2), (64, 3, 0.5))
    ]
    others = [
        played("vanilla", "vanilla", num_solved=9, rate=0.0),
        played("react", "react", num_solved=6, rate=0.0),
        played("concisehint", "concisehint", num_solved=1, rate=0.0),
    ]
    (curve,) = make_curves([*others, *strengths])
    assert curve.rates == pytest.approx((0.0, 0.1, 0.2, 0.5))
    assert curve.means == pytest.approx([0.6, 0.7, 0.8, 0.3])
    assert make_curves([*others, *strengths[:2]]) == []
