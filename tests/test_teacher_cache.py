from pathlib import Path

import pytest
import torch
from test_student import SETS, TEXTS, VOCABULARY, Steps, module_of, student_of
from torch import Tensor
from toy_language import trajectory_of

from lar_lightning.alignment import align
from lar_lightning.batches import DistillationBatch, collate
from lar_lightning.module import LatentActionModule
from lar_lightning.settings import DistillationSettings
from lar_lightning.training.teacher_cache import TeacherCache

IDENTITY = {"base_model": "one", "latent_vocabulary": "its"}


def batch_of(*texts: str) -> DistillationBatch:
    return collate([align(VOCABULARY, trajectory_of(text)) for text in texts])


def cached(module: LatentActionModule, folder: Path) -> LatentActionModule:
    module.teacher_cache = TeacherCache(folder, IDENTITY)
    return module


def refuse(*_: Tensor) -> Tensor:
    raise AssertionError("the teacher was asked again")


@SETS
@pytest.mark.parametrize("split", ["nll", "soft"])
def test_loss_and_gradients_are_those_without_a_cache(
    tmp_path: Path, trainable: str, split: str
) -> None:
    settings = DistillationSettings(split=split)  # type: ignore[arg-type]
    results = []
    for is_cached in (False, True, True):
        module = module_of(
            student_of("llama-tied", VOCABULARY, trainable=trainable), distillation=settings
        )
        if is_cached:
            cached(module, tmp_path)
        if trainable == "lora":  # adapters start as nothing
            for parameter in module.student.other_parameters:
                torch.nn.init.constant_(parameter, 0.01)
        loss, _ = module.compare(batch_of(*TEXTS), settings)
        loss.backward()
        gradients = {n: p.grad for n, p in module.student.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients, results[0][1], atol=1e-5, rtol=1e-5)


def test_teacher_reads_each_trajectory_once_whatever_batch_it_comes_in(tmp_path: Path) -> None:
    student = student_of("llama-tied", VOCABULARY)
    first = TeacherCache(tmp_path, IDENTITY)
    calls: list[int] = []

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        calls.append(len(ids))
        return student.teacher_hidden(ids, mask)

    first.hidden(batch_of(*TEXTS[:2]), read)
    first.hidden(batch_of(*TEXTS[1:]), read)
    assert calls == [2, len(TEXTS) - 2]
    again = TeacherCache(tmp_path, IDENTITY)
    batch = batch_of(*TEXTS[::-1])
    found = again.hidden(batch, refuse).flatten(0, 1)[batch.teacher_rows]
    expected = student.teacher_hidden(batch.teacher_ids, batch.teacher_mask).flatten(0, 1)
    torch.testing.assert_close(found, expected[batch.teacher_rows], atol=1e-5, rtol=1e-5)


def test_run_stopped_and_resumed_has_the_same_losses_bit_for_bit(tmp_path: Path) -> None:
    """The second epoch has other batches: recomputed states would differ in their last bits."""
    epochs = [
        [batch_of(*TEXTS[:2]), batch_of(*TEXTS[2:])],
        [batch_of(*TEXTS[1:3]), batch_of(TEXTS[0], TEXTS[3])],
    ]
    batches = [batch for epoch in epochs for batch in epoch]
    losses = []
    for num_before in (len(batches), 1, 2, 3):
        folder = tmp_path / str(num_before)
        steps = Steps(cached(module_of(student_of("llama-tied", VOCABULARY)), folder))
        found = []
        for number, batch in enumerate(batches):
            if number == num_before:
                cached(steps.module, folder)
            found += steps.take(batch, 1)
        losses.append(found)
    assert losses == losses[:1] * 4


def test_cache_of_another_teacher_or_vocabulary_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = student_of("llama-tied", VOCABULARY)
    TeacherCache(tmp_path, IDENTITY).hidden(batch_of(*TEXTS), student.teacher_hidden)
    TeacherCache(tmp_path, IDENTITY)
    assert "teacher cache: reused" in capsys.readouterr().out
    other = TeacherCache(tmp_path, {**IDENTITY, "base_model": "two"})
    assert "teacher cache: made anew (base_model: 'one' -> 'two')" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="asked again"):
        other.hidden(batch_of(*TEXTS), refuse)


@pytest.mark.parametrize("size", [0, 5, -7])
def test_damaged_file_is_removed_and_its_trajectories_are_read_again(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, batch = student_of("llama-tied", VOCABULARY), batch_of(*TEXTS)
    whole = TeacherCache(tmp_path, IDENTITY).hidden(batch, student.teacher_hidden)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:size])
    again = TeacherCache(tmp_path, IDENTITY)
    assert f"teacher cache: removed {file}, which is damaged" in capsys.readouterr().out
    assert torch.equal(again.hidden(batch, student.teacher_hidden), whole)
