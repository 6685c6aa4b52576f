"""A grid of methods on a tiny real model: it stops, goes on, and its tables are whole."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_benchmark import ToyBenchmark

from lar_lightning.__main__ import main
from lar_lightning.agents import load_agent
from lar_lightning.agents.lar import MADE_WITH, _is_trained, share_rollouts
from lar_lightning.agents.tokenskip import TokenSkip
from lar_lightning.benchmarks import BENCHMARKS
from lar_lightning.errors import NothingToLearn, SettingError
from lar_lightning.evaluation import runner
from lar_lightning.evaluation.ablate import ablate, reparameterization_rate
from lar_lightning.evaluation.grid import Grid
from lar_lightning.evaluation.runner import EpisodeFile, MethodRun, read_run
from lar_lightning.settings import EvaluationSettings, GridSettings

EVALUATION = EvaluationSettings(
    max_tokens=8, num_runs=2, max_model_len=512, engine="transformers", num_concurrent=4
)
GRID = GridSettings(num_held_out=3)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "toy", "toy_benchmark:ToyBenchmark")


def run_grid(folder: Path, checkpoint: Path, **changes: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {
        "grid_dir": folder,
        "backbones": {"tiny": str(checkpoint)},
        "benchmarks": ["toy"],
        "methods": {"vanilla": {}, "cot": None, "react": {}},
        "settings": GRID,
        "evaluation": EVALUATION,
        "prices": {"tiny": [1.0, 2.0]},
    }
    return ablate(**{**given, **changes})


def test_a_grid_has_a_row_for_each_cell_and_writes_its_tables(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rows = run_grid(tmp_path, tiny_checkpoint)
    assert [row["method"] for row in rows] == ["vanilla", "cot", "react"]
    assert {row["num_tasks"] for row in rows} == {3}
    assert [row["num_runs"] for row in rows] == [2, 1, 1]
    assert all(row["cost_per_1000_episodes"] > 0 for row in rows)
    results = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"rows.json", "grid_report.html", "table1.md", "table1.tex"} <= results
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert [cell["num_episodes"] for cell in cells] == [3, 3, 3]


def test_a_grid_that_was_stopped_goes_on_with_what_is_missing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    append = EpisodeFile.append
    num_appended = 0

    def interrupted(self: EpisodeFile, episode) -> None:
        nonlocal num_appended
        if num_appended == 4:
            raise KeyboardInterrupt
        num_appended += 1
        append(self, episode)

    monkeypatch.setattr(EpisodeFile, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_grid(tmp_path, tiny_checkpoint)
    monkeypatch.setattr(EpisodeFile, "append", append)
    kept = {path: path.read_text() for path in tmp_path.rglob("vanilla-seed0-*.jsonl")}
    capsys.readouterr()
    resumed = run_grid(tmp_path, tiny_checkpoint)
    assert "vanilla-seed0 on toy, run 0): 3 episodes reused, 0 to play" in capsys.readouterr().out
    for path, text in kept.items():
        assert path.read_text().startswith(text)
    fresh = run_grid(tmp_path / "fresh", tiny_checkpoint)
    for one, other in zip(resumed, fresh, strict=True):
        assert one["score"] == other["score"]
        assert one["action_tokens"] == other["action_tokens"]


def test_a_finished_grid_opens_no_engine(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_grid(tmp_path, tiny_checkpoint)

    def refused(*args, **kwargs):
        raise AssertionError("no engine is needed")

    monkeypatch.setattr(runner, "open_policy", refused)
    assert run_grid(tmp_path, tiny_checkpoint) == first


def test_a_torn_line_is_played_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    methods = {"vanilla": {}}
    first = run_grid(tmp_path, tiny_checkpoint, methods=methods)
    (path,) = tmp_path.rglob("vanilla-seed0-0.jsonl")
    path.write_bytes(path.read_bytes()[:-40])
    again = run_grid(tmp_path, tiny_checkpoint, methods=methods)
    assert again[0]["score"] == first[0]["score"]
    assert len(read_run(path, "vanilla", 0).episodes) == 3


def test_other_settings_set_episodes_aside_and_lose_none(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    methods = {"vanilla": {}}
    run_grid(tmp_path, tiny_checkpoint, methods=methods)
    shorter = EvaluationSettings(**{**vars(EVALUATION), "max_tokens": 4})
    run_grid(tmp_path, tiny_checkpoint, methods=methods, evaluation=shorter)
    assert len(list(tmp_path.rglob("vanilla-seed0-0.*.old"))) == 1
    (path,) = tmp_path.rglob("vanilla-seed0-0.jsonl")
    assert all(len(e.units) <= 4 for e in read_run(path, "vanilla", 0).episodes)


def test_more_tasks_are_added_to_those_that_are_there(
    tiny_checkpoint: Path, tmp_path: Path, capsys
) -> None:
    methods = {"cot": {}}
    run_grid(tmp_path, tiny_checkpoint, methods=methods)
    capsys.readouterr()
    run_grid(tmp_path, tiny_checkpoint, methods=methods, settings=GridSettings(num_held_out=4))
    assert "3 episodes reused, 1 to play" in capsys.readouterr().out


def test_seeds_are_played_only_by_what_learns(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = run_grid(tmp_path, tiny_checkpoint, settings=GridSettings(num_held_out=3, seeds=(0, 1)))
    assert {row["num_seeds"] for row in rows} == {1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"reakt": {}}}, "Did you mean 'react'"),
        ({"methods": {"cot": {"ratio": 0.5}}}, "`methods.cot` must have settings"),
        ({"methods": {}}, "`methods` must name one or more"),
        ({"backbones": {}}, "`backbones` must name one or more"),
        ({"benchmarks": ["toys"]}, "`benchmark` must be one of"),
        ({"settings": GridSettings(num_held_out=60)}, "`num_held_out` must be .* 5 on toy, one"),
        ({"methods": {"lar": {}}}, "`methods.lar.config` must be a YAML file"),
        ({"methods": {"lar": {"run_dir": "nowhere"}}}, "must be a trained run"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        run_grid(tmp_path, tiny_checkpoint, **changes)
    assert not list(tmp_path.iterdir())  # nothing was played


def test_a_benchmark_of_held_out_tasks_alone_teaches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ToyBenchmark.load_tasks
    monkeypatch.setattr(
        ToyBenchmark,
        "load_tasks",
        lambda self: [replace(task, is_held_out=True) for task in load(self)],
    )
    Grid(
        grid_dir=tmp_path,
        backbones={"tiny": "none"},
        benchmarks=["toy"],
        methods={
            "vanilla": {},
            "acon": {},
            "concisehint": {"is_trained": True, "data": "thoughts.jsonl"},
        },
        settings=GRID,
        evaluation=EVALUATION,
    )
    learners: dict[str, dict[str, Any]] = {
        "lar": {"config": "configs/tool_calls.yaml"},
        "tokenskip": {},
        "acon": {"num_ut_rounds": 1},
        "concisehint": {"is_trained": True},
    }
    for label, settings in learners.items():
        with pytest.raises(SettingError, match=f"`methods.{label}` must have training tasks"):
            run_grid(tmp_path, tmp_path, methods={label: settings})


def test_seeds_must_differ() -> None:
    with pytest.raises(SettingError, match="different numbers"):
        GridSettings(seeds=(1, 1))


def test_the_verb_reads_a_yaml(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "grid.yaml"
    config.write_text(
        f"grid_dir: {tmp_path / 'grid'}\nbackbones: {{tiny: {tiny_checkpoint}}}\n"
        "benchmarks: [toy]\nmethods:\n  vanilla:\n  react: {}\ngrid: {num_held_out: 2}\n"
        "evaluation: {engine: transformers, max_tokens: 4, max_model_len: 512, num_runs: 1}\n"
    )
    assert main(["ablate", "--config", str(config), "--grid.num_held_out=3"]) == 0
    rows = json.loads((tmp_path / "grid" / "results" / "rows.json").read_text())
    assert [(row["method"], row["num_tasks"]) for row in rows] == [("vanilla", 3), ("react", 3)]


def test_a_method_may_learn_from_another_benchmark() -> None:
    agent = load_agent("react", {"trained_on": {"kodcode": "humaneval+kodcode"}})
    assert agent.source_for("kodcode?path=x") == "humaneval+kodcode"
    assert agent.source_for("mbpp?path=x") == "mbpp?path=x"
    assert load_agent("react", {"trained_on": "toy"}).source_for("mbpp") == "toy"
    assert load_agent("react").source_for("mbpp") == "mbpp"


def test_the_rate_is_the_share_of_tokens_in_latents(tiny_checkpoint: Path, tmp_path: Path) -> None:
    run_grid(tmp_path, tiny_checkpoint, methods={"vanilla": {}})
    (path,) = tmp_path.rglob("vanilla-seed0-0.jsonl")
    assert reparameterization_rate(read_run(path, "vanilla", 0)) == 0.0
    empty = MethodRun(method="lar", run=0, wall_clock_seconds=0.0, episodes=())
    assert reparameterization_rate(empty) == 0.0


def test_the_toy_benchmark_is_a_benchmark() -> None:
    assert ToyBenchmark().load_tasks()[0].question == "Find 0."


def test_react_is_left_out_where_there_are_no_turns(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Single(ToyBenchmark):
        def __init__(self) -> None:
            super().__init__(styles=("direct", "cot"))

    monkeypatch.setattr("toy_benchmark.ToyBenchmark", Single)
    rows = run_grid(tmp_path, tiny_checkpoint)
    assert [row["method"] for row in rows] == ["vanilla", "cot"]


def test_the_clock_runs_from_the_first_request_and_over_all_sittings(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    opened = runner.open_policy

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(2)
        return opened(*arguments, **options)

    monkeypatch.setattr(runner, "open_policy", slowly)
    methods = {"vanilla": {}}
    run_grid(tmp_path, tiny_checkpoint, methods=methods, settings=GridSettings(num_held_out=2))
    (path,) = tmp_path.rglob("vanilla-seed0-0.jsonl")
    first = read_run(path, "vanilla", 0)
    assert first.wall_clock_seconds < 2
    assert first.wall_clock_seconds >= max(episode.seconds for episode in first.episodes) - 0.1
    run_grid(tmp_path, tiny_checkpoint, methods=methods, settings=GridSettings(num_held_out=3))
    assert read_run(path, "vanilla", 0).wall_clock_seconds > first.wall_clock_seconds


def test_a_method_that_finds_nothing_to_learn_is_left_out_and_the_grid_goes_on(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def refused(self: TokenSkip, workshop: Any) -> Any:
        raise NothingToLearn("`methods.tokenskip` must have thoughts")

    monkeypatch.setattr(TokenSkip, "prepare", refused)
    rows = run_grid(tmp_path, tiny_checkpoint, methods={"tokenskip": {}, "vanilla": {}})
    assert [row["method"] for row in rows] == ["vanilla"]
    assert "tokenskip is left out on toy: `methods.tokenskip` must" in capsys.readouterr().out
    assert "TokenSkip" in (tmp_path / "results" / "table1.md").read_text()


def test_other_options_of_a_benchmark_are_played_anew(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    methods = {"react": {}}
    for turns in ("4", "2"):
        rows = run_grid(
            tmp_path, tiny_checkpoint, methods=methods, benchmarks=[f"toy?turns={turns}"]
        )
        assert rows[0]["turns"] <= int(turns)
    assert len(list(tmp_path.rglob("react-seed0-0.*.old"))) == 1


def test_a_student_that_is_done_is_refused_under_other_settings(tmp_path: Path) -> None:
    made_with = {"settings": ["--seed_everything", "0"], "config": "model: {}"}
    assert not _is_trained(tmp_path, made_with)
    (tmp_path / MADE_WITH).write_text(json.dumps({**made_with, "is_done": True}))
    assert _is_trained(tmp_path, made_with)
    with pytest.raises(SettingError, match="got other settings"):
        _is_trained(tmp_path, {**made_with, "settings": ["--seed_everything", "1"]})


def test_a_run_that_has_seen_held_out_tasks_is_refused(
    tiny_checkpoint: Path, trained: Path, tmp_path: Path
) -> None:
    """The run kept 4 tasks; a grid with 30 would try it on some that it has learned from."""
    with pytest.raises(SettingError, match="must not have learned from held-out tasks"):
        run_grid(
            tmp_path,
            tiny_checkpoint,
            benchmarks=["humaneval"],
            methods={"lar": {"run_dir": str(trained)}},
            settings=GridSettings(num_held_out=30),
        )


def shared_by(folder: Path, *settings: str, config: str = "{}") -> Path:
    run_dir = folder / "prepared" / f"lar-{len(list(folder.rglob('run')))}" / "toy-seed0" / "run"
    share_rollouts(run_dir.parent, "toy", run_dir, list(settings), config)
    return (run_dir / "trajectories").resolve()


def test_runs_that_roll_out_alike_share_their_trajectories(tmp_path: Path) -> None:
    rollouts = ("--base_model", "tiny", "--data.init_args.rollouts.max_tokens", "12")
    config = "data: {init_args: {rollouts: {temperatures: [0.0]}, mining: {max_latents: 4}}}"
    first = shared_by(tmp_path, *rollouts, "--seed_everything", "0", config=config)
    assert first.is_dir()
    assert first.parent == tmp_path / "prepared" / "rollouts"
    strength = ("--data.init_args.mining.max_latents=8", "--model.learning_rate", "0.1")
    assert (
        shared_by(tmp_path, *rollouts, *strength, "--seed_everything", "1", config=config) == first
    )
    assert shared_by(tmp_path, *rollouts, config=config.replace("4}", "8}")) == first
    assert shared_by(tmp_path, *rollouts, config=config.replace("[0.0]", "[0.0, 1.0]")) != first
    longer = ("--base_model", "tiny", "--data.init_args.rollouts.max_tokens=13")
    assert shared_by(tmp_path, *longer, config=config) != first
    assert shared_by(tmp_path, *rollouts, "--data.base_model=other", config=config) != first
    assert shared_by(tmp_path, *rollouts, "--config", "stacked.yaml", config=config) != first


def test_trajectories_that_a_run_has_are_left_alone(tmp_path: Path) -> None:
    run_dir = tmp_path / "prepared" / "lar" / "toy-seed0" / "run"
    (run_dir / "trajectories").mkdir(parents=True)
    share_rollouts(run_dir.parent, "toy", run_dir, [], "{}")
    assert not (run_dir / "trajectories").is_symlink()


@pytest.mark.parametrize("config", ["", "data:", "data: data_modules.RolloutDataModule"])
def test_a_short_configuration_is_enough_to_share(tmp_path: Path, config: str) -> None:
    assert shared_by(tmp_path, config=config).is_dir()


def test_a_folder_of_trajectories_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    shared_by(tmp_path).rmdir()
    run_dir = next(tmp_path.rglob("run"))
    share_rollouts(run_dir.parent, "toy", run_dir, [], "{}")
    assert (run_dir / "trajectories").is_dir()


def test_students_of_several_seeds_and_strengths_find_the_same_rollouts(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Path] = []

    def fit(command: list[str]) -> int:
        run_dir = Path(command[command.index("--run_dir") + 1])
        found.append((run_dir / "trajectories").resolve())
        return 1

    monkeypatch.setattr("lar_lightning.agents.lar.run_program", fit)
    config = tmp_path / "fit.yaml"
    config.write_text("data: {init_args: {rollouts: {temperatures: [0.0]}}}")
    for seed, latents in ((0, 4), (1, 4), (0, 8)):
        lar = {"config": str(config), "options": [f"--data.init_args.mining.max_latents={latents}"]}
        with pytest.raises(SettingError, match="could not be trained"):
            run_grid(
                tmp_path,
                tiny_checkpoint,
                methods={f"lar@{latents}": {**lar, "agent": "lar"}},
                settings=replace(GRID, seeds=(seed,)),
            )
    assert len(found) == 3
    assert len(set(found)) == 1
    assert found[0].parent.name == "rollouts"
