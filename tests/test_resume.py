"""Runs that are stopped and started again, by the same command or by another."""

import shutil
from pathlib import Path

import pytest
import torch
from whole_runs import TEN_STEPS, checkpoint_of, fit_arguments, fit_until, metrics_of

from lar_lightning.__main__ import main

ON_POLICY = (
    "--trainer.max_steps=10",
    "--trainer.max_epochs=-1",
    "--trainer.log_every_n_steps=1",
    "--checkpoint.every_n_train_steps=1",
    "--model.trainable=lora",
    "--model.on_policy.share=0.66",
    "--model.on_policy.start_after=0.3",
    "--model.on_policy.max_tokens=12",
)


@pytest.fixture(scope="module")
def on_policy_run(
    rolled_out: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Three steps off-policy, then seven of which some are on-policy."""
    folder = Path(shutil.copytree(rolled_out, tmp_path_factory.mktemp("on_policy") / "run"))
    assert main(fit_arguments(folder, tiny_checkpoint, *ON_POLICY)) == 0
    return folder


def same_weights(run_dir: Path, other: Path) -> bool:
    resumed, whole = checkpoint_of(run_dir)["state_dict"], checkpoint_of(other)["state_dict"]
    return all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize("num_steps_before", [3, 8])
def test_a_run_that_was_stopped_ends_with_the_losses_of_one_that_was_not(
    num_steps_before: int,
    run_dir: Path,
    trained: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten batches are more than an epoch here.

    3 stops in the middle of the first, 8 near the end of it.
    """
    every_step = ("--checkpoint.every_n_train_steps=1", "--trainer.log_every_n_steps=1")
    arguments = fit_arguments(run_dir, tiny_checkpoint, *TEN_STEPS, *every_step)
    fit_until(num_steps_before, arguments, monkeypatch)
    assert checkpoint_of(run_dir)["global_step"] == num_steps_before
    assert main(arguments) == 0
    assert metrics_of(run_dir, "val/loss_nats")[0] == metrics_of(trained, "val/loss_nats")[0]
    assert len(metrics_of(run_dir, "val/loss_against_start")) > 0
    assert checkpoint_of(run_dir)["global_step"] == checkpoint_of(trained)["global_step"] == 10
    assert same_weights(run_dir, trained)


def test_a_finished_run_is_not_trained_again(
    trained: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (trained / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    options = ("--trainer.max_steps=10", "--trainer.max_epochs=-1", "--model.learning_rate=1.0")
    assert main(fit_arguments(trained, tiny_checkpoint, *options)) == 0
    assert (trained / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    output = capsys.readouterr().out
    assert "goes on from" in output
    assert "latent vocabulary: reused" in output
    assert metrics_of(trained, "val/loss_nats")[0] > metrics_of(trained, "val/loss_nats")[-1]


def test_other_settings_for_a_trained_run_are_refused(
    trained: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("--trainer.max_steps=20", "--trainer.max_epochs=-1", "--model.learning_rate=0.5")
    assert main(fit_arguments(trained, tiny_checkpoint, *options)) == 2
    error = capsys.readouterr().err
    assert "learning_rate: 1.0 -> 0.5" in error
    assert "choose another `run_dir`" in error.replace("Choose", "choose")


def test_another_batch_size_for_a_run_that_goes_on_is_refused(
    trained: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("--trainer.max_steps=20", "--trainer.max_epochs=-1", "--model.learning_rate=1.0")
    other = "--data.init_args.loading.batch_size=8"
    assert main(fit_arguments(trained, tiny_checkpoint, *options, other)) == 2
    assert "batch_size: 16 -> 8" in capsys.readouterr().err


@pytest.mark.parametrize("num_steps_before", [2, 4])
def test_grounded_run_that_was_stopped_ends_like_one_that_was_not(
    num_steps_before: int,
    run_dir: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three steps of grounding, then distillation with adapters: stopped within either stage.

    The epochs of the configuration stay in force: the estimate of steps must not lose the data
    position.
    """
    options = (
        "--trainer.max_steps=5",
        "--model.trainable=lora",
        "--model.distillation.grounding_steps=3",
        "--checkpoint.every_n_train_steps=1",
    )
    other = Path(shutil.copytree(run_dir, tmp_path / "whole"))
    assert main(fit_arguments(other, tiny_checkpoint, *options)) == 0
    arguments = fit_arguments(run_dir, tiny_checkpoint, *options)
    fit_until(num_steps_before, arguments, monkeypatch)
    stopped = checkpoint_of(run_dir)["state_dict"]
    adapters = [value for name, value in stopped.items() if "lora_B" in name]
    assert adapters
    assert any(value.any() for value in adapters) == (num_steps_before > 3)
    assert main(arguments) == 0
    assert same_weights(run_dir, other)


def test_run_with_a_teacher_cache_that_was_stopped_ends_like_one_that_was_not(
    run_dir: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The second epoch reads from disk what the first has written, before and after the stop."""
    options = (
        *TEN_STEPS,
        "--trainer.max_steps=14",
        "--model.teacher_cache=true",
        "--checkpoint.every_n_train_steps=1",
    )
    other = Path(shutil.copytree(run_dir, tmp_path / "whole"))
    assert main(fit_arguments(other, tiny_checkpoint, *options)) == 0
    arguments = fit_arguments(run_dir, tiny_checkpoint, *options)
    fit_until(12, arguments, monkeypatch)
    capsys.readouterr()
    assert main(arguments) == 0
    assert "teacher cache: reused" in capsys.readouterr().out
    assert same_weights(run_dir, other)


@pytest.mark.parametrize("num_steps_before", [2, 5, 9])
def test_on_policy_run_that_was_stopped_ends_like_one_that_was_not(
    num_steps_before: int,
    run_dir: Path,
    on_policy_run: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped before the stage, in it, and in the second epoch."""
    arguments = fit_arguments(run_dir, tiny_checkpoint, *ON_POLICY)
    fit_until(num_steps_before, arguments, monkeypatch)
    assert checkpoint_of(run_dir)["global_step"] == num_steps_before
    assert main(arguments) == 0
    assert same_weights(run_dir, on_policy_run)
    for name in ("num_units", "num_tokens", "loss_nats"):
        values = metrics_of(on_policy_run, f"train/on_policy_{name}")
        assert values[-1:] == metrics_of(run_dir, f"train/on_policy_{name}")[-1:]


def test_on_policy_steps_begin_where_they_should_and_are_logged(on_policy_run: Path) -> None:
    sampled = metrics_of(on_policy_run, "train/on_policy")
    assert sampled == [0, 0, 0, 0, 0, 1, 1, 1, 0, 1]  # by the seed, from the fourth on
    assert not any(metrics_of(on_policy_run, "train/on_policy_skipped"))
    units = metrics_of(on_policy_run, "train/on_policy_num_units")
    tokens = metrics_of(on_policy_run, "train/on_policy_num_tokens")
    assert len(units) == 5
    assert all(0 < few <= many for few, many in zip(units, tokens, strict=True))


def test_other_on_policy_settings_for_a_trained_run_are_refused(
    on_policy_run: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    other = (*ON_POLICY, "--trainer.max_steps=12", "--model.on_policy.share=0.5")
    assert main(fit_arguments(on_policy_run, tiny_checkpoint, *other)) == 2
    assert "on_policy.share: 0.66 -> 0.5" in capsys.readouterr().err
