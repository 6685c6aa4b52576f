"""Every grid in configs/tables: what it names exists, and it runs whole with a tiny model."""

import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import ROLLOUTS, make_tiny_run

from lar_lightning.__main__ import main
from lar_lightning.agents import load_agent
from lar_lightning.agents.agent import TurnAgent
from lar_lightning.agents.lar import MADE_WITH
from lar_lightning.agents.tokenskip import TokenSkip
from lar_lightning.benchmarks import BENCHMARKS
from lar_lightning.evaluation.ablate import ablate
from lar_lightning.settings import EvaluationSettings, GridSettings

CONFIGS = sorted(Path("configs/tables").glob("*.yaml"))
PAPER = {"Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct"}
SMALL = {
    "grid": {"num_held_out": 2, "seeds": [0]},
    "evaluation": {
        "engine": "transformers",
        "max_tokens": 12,
        "max_model_len": 512,
        "num_concurrent": 16,
    },
}


def read(config: Path) -> dict[str, Any]:
    return yaml.safe_load(config.read_text())


def agent_of(label: str, settings: dict[str, Any] | None) -> str:
    return (settings or {}).get("agent", label.partition("@")[0])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_what_a_grid_names_exists(config: Path) -> None:
    content = read(config)
    sources = list(content["benchmarks"])
    for label, settings in content["methods"].items():
        settings = dict(settings or {})
        name = settings.pop("agent", label.partition("@")[0])
        agent = load_agent(name, settings)
        sources += [agent.source_for(text) for text in content["benchmarks"]]
        if name == "lar":
            assert Path(settings["config"]).is_file()
    for text in sources:
        for part in text.split("+"):
            name, _, query = part.partition("?")
            module, _, class_name = BENCHMARKS[name].partition(":")
            known = inspect.signature(getattr(import_module(module), class_name)).parameters
            assert {pair.partition("=")[0] for pair in query.split("&") if pair} <= set(known)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_grid_runs_whole_with_a_tiny_model(
    config: Path,
    tiny_checkpoint: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BENCHMARKS, "toy", "toy_benchmark:ToyBenchmark")
    # What a random model writes has no end, and so nothing to learn from: see test_tokenskip.py.
    monkeypatch.setattr(TokenSkip, "prepare", TurnAgent.prepare)
    content = read(config)
    methods = {}
    for label, settings in content["methods"].items():
        small: dict[str, Any] = dict(settings or {})
        if agent_of(label, settings) == "lar":
            small |= {"run_dir": str(trained), "trained_on": ""}
        methods[label] = small
    backbones = dict.fromkeys(content["backbones"], str(tiny_checkpoint))
    overlay = {**SMALL, "backbones": backbones, "methods": methods, "benchmarks": ["toy"]}
    overlay["grid_dir"] = str(tmp_path / "grid")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(overlay))
    assert main(["ablate", "--config", str(config), "--config", str(tmp_path / "small.yaml")]) == 0
    rows = json.loads((tmp_path / "grid" / "results" / "rows.json").read_text())
    assert {(row["backbone"], row["method"]) for row in rows} == {
        (backbone, label.partition("@")[0]) for backbone in backbones for label in methods
    }
    assert all(row["num_tasks"] == 2 for row in rows)
    assert (tmp_path / "grid" / "results" / "grid_report.html").exists()


def test_the_papers_rows_are_there() -> None:
    """All methods of Table 1 and both backbones, on the benchmarks of the paper."""
    first = read(Path("configs/tables/table1.yaml"))
    assert set(first["backbones"].values()) == PAPER
    assert set(first["methods"]) == {
        *("vanilla", "cot", "react", "tokenskip", "acon", "concisehint", "lar")
    }
    names = [text.partition("?")[0] for text in first["benchmarks"]]
    assert names == ["triviaqa", "kodcode", "mind2web"]
    second = read(Path("configs/tables/table2.yaml"))
    assert second["methods"]["lar"]["trained_on"].startswith("kodcode")
    assert set(second["backbones"].values()) == PAPER
    assert set(read(Path("configs/tables/table3.yaml"))["backbones"].values()) == PAPER


def test_a_grid_trains_its_own_student(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """With the command `fit` as a user gives it; only the rollouts are there already."""
    config = tmp_path / "fit.yaml"
    content = read(Path("configs/quickstart.yaml"))
    content["trainer"] |= {"max_steps": 1, "num_sanity_val_steps": 0, "logger": False}
    content["model"] = {"trainable": "rows"}
    data = content["data"]["init_args"]
    data["rollouts"] = {"temperatures": [0.0], "held_out_temperatures": [0.0]}
    data["mining"] = {"max_latents": 12, "min_support": 3}
    config.write_text(yaml.safe_dump(content))
    run_dir = tmp_path / "grid" / "tiny" / "prepared" / "lar" / "humaneval-seed0" / "run"
    make_tiny_run(run_dir, tiny_checkpoint)
    shared = (run_dir / "trajectories").rename(tmp_path / "shared")
    (run_dir / "trajectories").symlink_to(shared, target_is_directory=True)
    rows = ablate(
        tmp_path / "grid",
        {"tiny": str(tiny_checkpoint)},
        ["humaneval"],
        {"vanilla": {}, "lar": {"config": str(config)}},
        GridSettings(num_held_out=ROLLOUTS.num_held_out),
        EvaluationSettings(
            engine="transformers", max_tokens=ROLLOUTS.max_tokens, max_model_len=2048, num_runs=1
        ),
        {},
    )
    assert json.loads((run_dir / MADE_WITH).read_text())["is_done"]
    assert [row["method"] for row in rows] == ["vanilla", "lar"]
    assert 0 < rows[1]["mined_rate"] < 1
    assert rows[1]["reparameterization_rate"] is not None
    assert (tmp_path / "grid" / "results" / "tiny-humaneval" / "figure3.png").exists()
