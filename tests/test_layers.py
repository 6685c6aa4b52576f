"""Imports go one way.

The plug-ins know the library, the library never them, and heavy packages stay where they belong.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "lar_lightning").rglob("*.py"))
PURE = (
    "trajectories",
    "segments",
    "alignment",
    "batches",
    "losses",
    "mining",
)
ROOMS = (
    *("errors", "artefacts", "settings"),
    *("automaton", "segments", "trajectories", "base_models", "tokenizer", "run_folder"),
    *("policies", "benchmarks", "mining"),
    *("alignment", "batches", "loading", "losses", "models"),
    *("recovery", "distributed", "training", "module"),
    *("export", "agents", "rollouts", "recordings", "stages"),
    *("estimates", "evaluation", "tracking", "metrics", "abstraction", "collapse"),
    *("verbs", "cli", "__main__"),
)
"""Files and folders of the library, each of which may know those before it."""
FRAMEWORKS = {"lightning", "pytorch_lightning", "transformers", "wandb"}


def imports(node: ast.AST, *, at_load: bool) -> Iterator[str]:
    """Yield the top-level packages that a tree imports.

    Args:
        node: Of the tree.
        at_load: Leave out what is imported inside functions or for type checkers only.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            yield child.module.partition(".")[0]
        elif at_load and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif at_load and isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from (name for other in child.orelse for name in imports(other, at_load=True))
        else:
            yield from imports(child, at_load=at_load)


def packages_of(file: Path, *, at_load: bool = False) -> set[str]:
    return set(imports(ast.parse(file.read_text(encoding="utf-8")), at_load=at_load))


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from d.e import g\n"
    source += "class K:\n    import h\ntry:\n    import i\nexcept ImportError:\n    pass\n"
    tree = ast.parse(source)
    assert set(imports(tree, at_load=False)) == {"a", "c", "d", "h", "i"}
    assert set(imports(tree, at_load=True)) == {"a", "h", "i"}


def named(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def room_of(file: Path) -> str:
    return file.relative_to(ROOT / "lar_lightning").with_suffix("").parts[0]


PURE_FILES = [file for file in LIBRARY if room_of(file) in PURE]


def rooms_known(tree: ast.AST) -> set[str]:
    """Return the rooms that a file imports, in functions and for type checkers too."""
    names = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
    }
    names |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    return {name.split(".")[1] for name in names if name.startswith("lar_lightning.")}


def test_every_room_is_where_the_data_passes() -> None:
    assert sorted({room_of(file) for file in LIBRARY} - {"__init__"}) == sorted(ROOMS)


@pytest.mark.parametrize("file", LIBRARY, ids=named)
def test_a_room_knows_only_those_before_it(file: Path) -> None:
    known = rooms_known(ast.parse(file.read_text(encoding="utf-8")))
    room = room_of(file)
    before = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ()
    assert known - set(before) == set()


def test_the_readme_has_the_rooms_in_this_order() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = page.partition("## Map of the code")[2].partition("`callbacks/`")[0]
    cells = "".join(re.findall(r"(?m)^\| (`[^|]+) \|", rows))
    assert re.findall(r"`(\w+)/?`", cells) == list(ROOMS)


def test_a_way_back_is_seen() -> None:
    source = "from lar_lightning import stages\ndef f():\n    import lar_lightning.losses.folding\n"
    source += "if TYPE_CHECKING:\n    from lar_lightning.agents.play import Player\n"
    assert rooms_known(ast.parse(source)) == {"stages", "losses", "agents"}


@pytest.mark.parametrize("file", LIBRARY, ids=named)
def test_library_never_imports_the_plug_ins(file: Path) -> None:
    assert packages_of(file).isdisjoint({"callbacks", "data_modules", "tests"})


def test_plug_ins_never_import_each_other() -> None:
    for folder, other in (("callbacks", "data_modules"), ("data_modules", "callbacks")):
        for file in (ROOT / folder).rglob("*.py"):
            assert other not in packages_of(file), named(file)


def test_one_file_imports_vllm_and_only_when_it_is_opened() -> None:
    assert [named(file) for file in LIBRARY if "vllm" in packages_of(file)] == [
        "lar_lightning/policies/vllm_engine.py"
    ]
    assert [named(file) for file in LIBRARY if "vllm" in packages_of(file, at_load=True)] == []


def test_pure_modules_exist() -> None:
    assert set(map(room_of, PURE_FILES)) == set(PURE)


@pytest.mark.parametrize("file", PURE_FILES, ids=named)
def test_pure_logic_names_no_framework(file: Path) -> None:
    assert packages_of(file, at_load=True).isdisjoint(FRAMEWORKS)


def loaded_after(*modules: str) -> set[str]:
    """Return the top-level packages in memory after a fresh Python has imported `modules`."""
    code = "import json, sys\n" + "".join(f"import {module}\n" for module in modules)
    code += "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(json.loads(result.stdout))


def test_pure_logic_loads_no_framework() -> None:
    modules = [
        named(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for file in PURE_FILES
    ]
    loaded = loaded_after(*modules)
    assert {"lar_lightning", "torch"} <= loaded
    assert loaded.isdisjoint(FRAMEWORKS | {"vllm"})


@pytest.mark.parametrize(
    "module", ["lar_lightning.verbs", "lar_lightning.settings", "lar_lightning.__main__"]
)
def test_command_line_loads_nothing_heavy(module: str) -> None:
    loaded = loaded_after(module)
    assert "lar_lightning" in loaded
    assert loaded.isdisjoint(FRAMEWORKS | {"vllm", "torch", "numpy"})


def test_engines_load_nothing_before_they_are_opened() -> None:
    assert loaded_after("lar_lightning.policies").isdisjoint(FRAMEWORKS | {"vllm", "torch"})
