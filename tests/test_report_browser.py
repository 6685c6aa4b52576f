"""The page about a run in a real browser: it renders, sorts, searches, and fits small screens."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browser, find_chromium
from finished_run import (
    HOSTILE,
    SEGMENT_TEXTS,
    add_training_records,
    make_finished_run,
    make_tokenizer,
    make_vocabulary,
)

from lar_lightning.evaluation.report import write_report

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="there is no chromium on PATH: `make test` installs it as root on Debian",
)

COLUMN = """
(column) => Array.from(document.querySelectorAll('#latents tbody tr'),
  (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim())
"""
HEADS = "Array.from(document.querySelectorAll('#latents thead th'), (th) => th.textContent.trim())"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_tokenizer()
    folder = tmp_path_factory.mktemp("run")
    run_dir = make_finished_run(folder, tokenizer, make_vocabulary(tokenizer))
    add_training_records(run_dir)
    return write_report("some/model", run_dir)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert CHROMIUM is not None
    with browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(chromium: Page, report: Path) -> Page:
    chromium.session = None
    chromium.complaints, chromium.requests = [], []
    chromium.open(report, 1200, 900)
    return chromium


def column(page: Page, name: str) -> list[str]:
    return page.run(f"({COLUMN})({page.run(HEADS).index(name)})")


def button(name: str) -> str:
    return (
        "Array.from(document.querySelectorAll('#latents thead button'))"
        f".find((button) => button.textContent.trim() === '{name}')"
    )


def test_page_renders_whole_without_a_complaint_or_a_request(page: Page, report: Path) -> None:
    headings = page.run("Array.from(document.querySelectorAll('h2'), (h) => h.textContent)")
    for heading in ("Alarms", "Horizon", "Results", "Training", "Latent actions", "Side by side"):
        assert heading in headings
    assert page.run(
        "Array.from(document.querySelectorAll('svg'))"
        ".filter((svg) => !svg.closest('details'))"
        ".every((svg) => svg.getBoundingClientRect().height > 20)"
    )
    assert page.complaints == []
    assert page.requests == [report.as_uri()]


def test_hostile_texts_neither_run_nor_become_elements(page: Page) -> None:
    assert page.run("document.scripts.length") == 1
    assert HOSTILE in page.run("document.body.textContent")
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.bad=1>')")
    page.run(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'bad=1'}))"
    )
    assert page.run("typeof window.bad") == "undefined"
    assert any("Content Security Policy" in complaint for complaint in page.complaints)


def test_columns_sort_both_ways_as_numbers_and_as_text(page: Page) -> None:
    page.run(f"{button('Occurrences')}.click()")
    assert column(page, "Occurrences") == ["13", "12", "11", "10"]
    page.run(f"{button('Occurrences')}.click()")
    assert column(page, "Occurrences") == ["10", "11", "12", "13"]
    page.run(f"{button('Text')}.click()")
    assert column(page, "Text") == sorted(SEGMENT_TEXTS)
    sorts = "Array.from(document.querySelectorAll('#latents [aria-sort]'), (h) => h.ariaSort)"
    assert page.run(sorts) == ["ascending"]


def test_what_is_not_known_comes_last_either_way(page: Page) -> None:
    for _ in range(2):
        page.run(f"{button('Due, held out')}.click()")
        assert column(page, "Due, held out")[0] == "10.0"


def test_keyboard_alone_sorts_searches_and_opens_an_example(page: Page) -> None:
    page.run("document.getElementById('latents-filter').focus()")
    page.type("DEF")
    assert column(page, "Text") == ["def "]
    assert "1 of 4 rows contain that" in page.run(
        "document.querySelector('[data-tools=latents] output').textContent"
    )
    page.press("Tab")  # what scrolls sideways can be reached too
    focused = (
        "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"
    )
    assert page.run(focused) == "Latent actions"
    page.press("Tab")
    assert page.run(focused).strip() == "Text"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.run(outline) == "solid"
    page.press("Enter")
    assert page.run("document.activeElement.closest('th').ariaSort") == "ascending"
    page.run("document.querySelector('#latents summary').focus()")
    page.press("Enter")
    assert page.run("document.querySelector('#latents details').open")
    assert page.run("document.querySelector('#latents details[open] mark').textContent") == "def "


def test_search_finds_white_space_by_its_marks(page: Page) -> None:
    search = """(text) => {
      const box = document.getElementById('latents-filter');
      box.value = text; box.dispatchEvent(new Event('input'));
    }"""
    page.run(f"({search})('):\u21b5')")
    assert column(page, "Text") == ["):\n    return "]
    page.run(f"({search})('nothing has this')")
    assert column(page, "Text") == []
    page.run(f"({search})('')")
    assert len(column(page, "Text")) == 4


@pytest.mark.parametrize("width", [320, 390, 768])
def test_small_screens_need_no_sideways_scrolling_of_the_page(
    chromium: Page, report: Path, width: int
) -> None:
    chromium.session = None
    chromium.open(report, width, 800)
    chromium.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert chromium.run("document.documentElement.scrollWidth") <= width
    heights = (
        "Math.min(...Array.from(document.querySelectorAll('[data-browse] thead button'),"
        " (b) => b.getBoundingClientRect().height))"
    )
    assert chromium.run(heights) >= 24  # can be hit with a finger


def test_dark_screens_get_a_dark_page_and_paper_a_light_one(chromium: Page, report: Path) -> None:
    chromium.session = None
    chromium.open(report, 1200, 900, is_dark=True)
    colour = "getComputedStyle(document.body).backgroundColor"
    assert chromium.run(colour) == "rgb(21, 23, 27)"
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    chromium.call("Emulation.setEmulatedMedia", media="print", features=features)
    assert chromium.run(colour) == "rgb(251, 250, 246)"
    assert len(chromium.call("Page.printToPDF")["data"]) > 10_000
