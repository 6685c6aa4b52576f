"""Numbers that are not finite: what is said of them, and what is left behind."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from whole_runs import checkpoint_of, fit_arguments

from lar_lightning.__main__ import main
from lar_lightning.batches import DistillationBatch
from lar_lightning.module import LatentActionModule

STEPS = (
    "--trainer.max_steps=8",
    "--trainer.max_epochs=-1",
    "--checkpoint.every_n_train_steps=1",
)


def check_last_checkpoint(run_dir: Path, num_steps: int) -> None:
    checkpoint = checkpoint_of(run_dir)
    assert checkpoint["global_step"] == num_steps
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_a_loss_that_is_not_finite_names_term_and_trajectory_and_keeps_the_last_checkpoint(
    run_dir: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    hidden = LatentActionModule._hidden
    broken: list[str] = []

    def spoiled(
        self: LatentActionModule, batch: DistillationBatch, **options: object
    ) -> tuple[Tensor, Tensor]:
        teacher, student = hidden(self, batch, **options)  # type: ignore[arg-type]
        if self.global_step == 3 and self.trainer.training:
            broken.append(batch.trajectory_ids[1])
            length = batch.student_ids.shape[1]
            place = torch.zeros(len(student), 1)
            place[length : 2 * length] = torch.nan
            student = student + place
        return teacher, student

    monkeypatch.setattr(LatentActionModule, "_hidden", spoiled)
    assert main(fit_arguments(run_dir, tiny_checkpoint, *STEPS)) == 2
    said = capsys.readouterr().err
    assert "the loss must be finite, got nan at step 3: the folded term in" in said
    assert f"rows, of {broken[0]}; the split term in" in said
    check_last_checkpoint(run_dir, 3)


def test_gradients_that_are_not_finite_do_not_reach_weights_or_checkpoint(
    run_dir: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    backward = LatentActionModule.backward

    def spoiled(self: LatentActionModule, loss: Tensor, *rest: object) -> None:
        backward(self, loss, *rest)
        if self.global_step == 3:
            gradient = self.student.rows.input_rows.grad
            assert gradient is not None
            gradient[0, 0] = torch.inf

    monkeypatch.setattr(LatentActionModule, "backward", spoiled)
    assert main(fit_arguments(run_dir, tiny_checkpoint, *STEPS)) == 2
    assert "gradients must be finite, got others at step 3" in capsys.readouterr().err
    check_last_checkpoint(run_dir, 3)


def test_trajectories_longer_than_the_limit_are_left_out_or_cut_and_counted(
    run_dir: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("--trainer.max_steps=1", "--data.init_args.loading.max_tokens=60")
    with pytest.warns(UserWarning, match=r"train: of 160 trajectories, \d+ are left out and 0 are"):
        assert main(fit_arguments(run_dir, tiny_checkpoint, *options)) == 0
    options = ("--trainer.max_steps=1", "--data.init_args.loading.max_tokens=5")
    assert main(fit_arguments(run_dir, tiny_checkpoint, *options)) == 2
    said = capsys.readouterr().err
    assert "`loading.max_tokens` must hold a trajectory, got 5 where the shortest of train" in said
