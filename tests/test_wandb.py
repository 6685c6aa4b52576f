"""Weights & Biases offline: a run that is killed, goes on, and is read back from its files."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from whole_runs import TEN_STEPS, checkpoint_of, fit_arguments

from lar_lightning.__main__ import main
from lar_lightning.errors import SettingError
from lar_lightning.evaluation.plots import read_curves
from lar_lightning.module import LatentActionModule
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tracking.tracked_files import artefact
from lar_lightning.tracking.tracked_run import (
    IDENTITY_FILE,
    TrackedRun,
    alert,
    has_key,
    read_identity,
)
from lar_lightning.tracking.workspace import MEDIA, PANELS, RESULTS, workspace
from tests.processes import Running
from tests.wandb_files import Life, curves_of, lives_of

pytest.importorskip("wandb")
KILLED_AT = 5
EVERY_STEP = (
    *TEN_STEPS,
    "--checkpoint.every_n_train_steps=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.val_check_interval=3",
    "--trainer.check_val_every_n_epoch=null",
)
RESULT = {
    "benchmark": "toy",
    "num_tasks": 4,
    "num_runs": 1,
    "score": 0.5,
    "generated_units": 90,
    "expanded_tokens": 100,
    "units_per_expanded_token": 0.9,
    "generated_units_against_vanilla": -0.1,
    "score_interval_95": [0.0, 1.0],
    "expanded_tokens_per_second": 10.0,
    "expanded_tokens_per_second_range": [9.0, 11.0],
    "wall_clock_seconds": 1.0,
    "wall_clock_seconds_range": [1.0, 1.0],
    "agreement": 0.8,
}


@pytest.fixture(autouse=True)
def without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def kill_at(num_steps: int) -> None:
    """Kill the process where a step would begin."""
    step = LatentActionModule.training_step

    def dying(self: LatentActionModule, batch: object, batch_idx: int) -> object:
        if self.global_step == num_steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, batch_idx)  # type: ignore[arg-type]

    LatentActionModule.training_step = dying  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def tracked(
    rolled_out: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Five steps, kill -9, five steps, export, results of an evaluation, `track`."""
    folder = tmp_path_factory.mktemp("tracked")
    run_dir = Path(shutil.copytree(rolled_out, folder / "run"))
    arguments = fit_arguments(
        run_dir, tiny_checkpoint, *EVERY_STEP, "--config", "configs/wandb.yaml"
    )
    environment = {"NETRC": str(folder / "no-netrc"), "HOME": str(folder)}
    first = Running(
        arguments,
        folder / "first.txt",
        prepare=kill_at,
        options=[KILLED_AT],
        environment=environment,
    )
    assert first.wait() == -signal.SIGKILL, first.said
    assert checkpoint_of(run_dir)["global_step"] == KILLED_AT
    second = Running(arguments, folder / "second.txt", environment=environment)
    assert second.wait() == 0, second.said
    assert "W&B: offline, since there is no key" in second.said
    rows = [{**RESULT, "method": name} for name in ("vanilla", "lar")]
    (run_dir / "results.json").write_text(json.dumps(rows))
    own = [f"--base_model={tiny_checkpoint}", f"--run_dir={run_dir}"]
    for verb in ("export", "track"):
        third = Running([verb, *own], folder / f"{verb}.txt", environment=environment)
        assert third.wait() == 0, third.said
    return run_dir


@pytest.fixture(scope="module")
def lives(tracked: Path) -> list[Life]:
    return lives_of(tracked)


def test_all_lives_are_one_run(tracked: Path, lives: list[Life]) -> None:
    identity = json.loads((tracked / IDENTITY_FILE).read_text())
    assert len(lives) == 3
    assert all(life.folder.name.endswith(identity["id"]) for life in lives)
    whole = lives[1:]  # W&B has lost what it was told in its last seconds
    assert {life.run_id for life in whole} == {identity["id"]}
    assert {life.project for life in whole} == {identity["project"]} == {"lar_lightning"}


def test_every_value_of_the_csv_log_is_there_across_a_kill(
    tracked: Path, lives: list[Life]
) -> None:
    logged = read_curves(tracked / "logs")
    assert list(logged["train/loss_nats"]) == list(range(10))
    assert logged["val/loss_nats"]
    assert {*logged} >= {name for drawn in PANELS.values() for y in drawn.values() for name in y}
    for life in lives[1:]:
        told = curves_of([life])
        for name, values in logged.items():
            assert name == "epoch" or told[name] == pytest.approx(values), (
                name,
                {*values} ^ {*told[name]},
                life.folder,
            )


def test_wandb_knows_the_whole_configuration(lives: list[Life]) -> None:
    config = lives[1].config["run"]
    assert config["model"]["learning_rate"] == 1.0
    assert config["data"]["init_args"]["mining"]["max_latents"] == 12
    classes = [callback["class_path"] for callback in config["trainer"]["callbacks"]]
    assert {"callbacks.HorizonMetrics", "callbacks.TrackedArtefacts"} <= {*classes}


def test_artefacts_hold_the_files_of_the_run_with_their_lineage(
    tracked: Path, lives: list[Life]
) -> None:
    name = lives[1].run_id
    for life in lives[1:]:
        read, made = (
            life.artefacts[f"{kind}-{name}"] for kind in ("trajectories", "latent-vocabulary")
        )
        assert (read.type, read.use_after_commit) == ("dataset", True)
        assert (made.type, made.use_after_commit) == ("latent-vocabulary", False)
        assert paths_of(read) == {"train.jsonl", "held_out.jsonl"}
        assert "latent_vocabulary.json" in paths_of(made)
    last = lives[-1].artefacts
    assert last[f"export-{name}"].type == "model"
    assert "model.safetensors" in paths_of(last[f"export-{name}"])
    assert "results.json" in paths_of(last[f"results-{name}"])
    assert paths_of(last[f"report-{name}"]) == {"report.html"}
    for record in last.values():
        for file in record.manifest.contents:
            assert Path(file.local_path).exists()


def paths_of(record: object) -> set[str]:
    return {file.path for file in record.manifest.contents}  # type: ignore[attr-defined]


def test_tables_and_page_are_there(tracked: Path, lives: list[Life]) -> None:
    vocabulary = LatentVocabulary.load(tracked)
    for life in lives[1:]:
        table = life.table("latents/vocabulary")
        column = table["columns"].index("text")
        assert [row[column] for row in table["data"]] == [item.text for item in vocabulary.latents]
    results = lives[-1].table("results/methods")
    assert [row[0] for row in results["data"]] == ["vanilla", "lar"]
    (key,) = MEDIA
    assert lives[-1].media(key).read_text() == (tracked / "report.html").read_text()


def test_summary_compares_first_and_best_over_all_lives(tracked: Path, lives: list[Life]) -> None:
    for name, values in read_curves(tracked / "logs").items():
        if name.startswith("val/"):
            for life in lives[1:]:
                assert life.summary[f"start/{name}"] == pytest.approx(values[min(values)])
                assert life.summary[name] == pytest.approx(values[max(values)])
    losses = read_curves(tracked / "logs")["val/loss_nats"].values()
    assert lives[1].summary["best/val/loss_nats"] == pytest.approx(min(losses))
    assert set(RESULTS.values()) <= set(lives[-1].summary)
    assert lives[-1].summary["results/saved_by_latents"] == pytest.approx(0.1)


def test_run_trained_without_wandb_can_be_tracked_later(
    trained: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    own = [f"--base_model={tiny_checkpoint}", f"--run_dir={trained}"]
    assert main(["track", *own, "--project=later"]) == 0
    assert "export, results not there yet" in capsys.readouterr().out
    (life,) = lives_of(trained)
    assert life.project == "later"
    for name, values in read_curves(trained / "logs").items():
        assert name == "epoch" or curves_of([life])[name] == pytest.approx(values), name


def test_alerts_and_tables_of_callbacks_arrive(tmp_path: Path) -> None:
    logger = TrackedRun(save_dir=tmp_path)
    logger.log_metrics({"val/loss_nats": 1.0}, step=3)
    logger.log_table("val/samples", columns=["text"], data=[["<b>"]], step=3)
    alert([logger], "collapse", "step 3: held-out divergence rises")
    logger.finalize("success")
    (life,) = lives_of(tmp_path)
    assert [(item.title, item.level) for item in life.alerts] == [("collapse", "WARN")]
    assert life.table("val/samples")["data"] == [["<b>"]]
    assert curves_of([life])["val/loss_nats"] == {3: 1.0}


def test_key_is_found_where_wandb_looks_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not has_key()
    (tmp_path / "no-netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    assert has_key()
    (tmp_path / "no-netrc").write_text("machine elsewhere login user password x")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_key()


def test_identity_stays_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / IDENTITY_FILE).write_text('{"id": "kept", "project": "p", "entity": null}')
    logger = TrackedRun(save_dir=tmp_path)
    logger._identify()
    assert (logger.version, logger.name) == ("kept", "p")
    (tmp_path / IDENTITY_FILE).write_text('{"id": ')
    with pytest.raises(SettingError, match="W&B's identity as JSON"):
        read_identity(tmp_path)


def test_checkpoints_are_not_logged_as_models(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"`trainer\.logger\.log_model` must be false"):
        TrackedRun(save_dir=tmp_path, log_model=True)


def test_artefact_leaves_out_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")

    class Named:
        id = "abc"

    files = [tmp_path / "a.json", tmp_path / "missing.json"]
    made = artefact(Named(), "some", "dataset", files)  # type: ignore[arg-type]
    assert made.name == "some-abc"
    assert set(made.manifest.entries) == {"a.json"}


def test_workspace_has_a_panel_for_every_metric() -> None:
    pytest.importorskip("wandb_workspaces", reason="the package wandb-workspaces is not installed")
    spec = workspace("us", "tests")._to_model().model_dump_json()
    drawn = {name for section in PANELS.values() for names in section.values() for name in names}
    for name in (*drawn, *RESULTS.values(), *MEDIA):
        assert f'{name}"' in spec


def test_workspace_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(SettingError, match="pip install wandb-workspaces"):
        workspace("us", "tests")
