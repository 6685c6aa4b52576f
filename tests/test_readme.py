"""What README and docs/ point to is there."""

import re
from pathlib import Path

import pytest

from lar_lightning.settings import MiningSettings

PAGES = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_configurations_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"\bconfigs/[\w/]+\.\w+", page.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not Path(name).is_file()] in (
        [],
        ["configs/my_run.yaml"],  # the reader's own
    )


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"(?m)^([\w-]+):", Path("Makefile").read_text(encoding="utf-8")))
    named = set(re.findall(r"`make ([\w-]+)", page.read_text(encoding="utf-8")))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_tests_that_are_named_exist(page: Path) -> None:
    """Whole names, and beginnings that end in `...`."""
    text = page.read_text(encoding="utf-8")
    sources = {path.name: path.read_text(encoding="utf-8") for path in Path("tests").glob("*.py")}
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?", text):
        assert file in sources
        assert not name or f"def {name}(" in sources[file]
    for name, rest in re.findall(r"`(test_\w+?)(\.\.\.)?`", text):
        assert any(f"def {name}{'' if rest else '('}" in source for source in sources.values()), (
            name
        )


def test_rules_that_are_called_the_defaults_are_them() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    rules = re.findall(r"defaults of `mining` since [\s\S]*?\n- \*", pages)
    assert len(rules) == 2  # README, and the page that explains its results
    for rule in rules:
        named = dict(re.findall(r"`(min_support|max_\w+|min_certain_share) ([\d.]+)", rule))
        assert len(named) == 4
        for name, value in named.items():
            assert getattr(MiningSettings(), name) == float(value)
