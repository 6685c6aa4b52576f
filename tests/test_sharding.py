"""Training that is shared out among processes does what one process does.

Two processes on the CPU, over gloo, against one process that accumulates two batches a step. The
one process reads batches whole as the two do, so that both round alike.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from test_student import ARCHITECTURES, VOCABULARY, random_model
from tiny_run import make_tiny_run
from whole_runs import fit_arguments, metrics_of

from lar_lightning.__main__ import main
from lar_lightning.batches import DistillationBatch
from lar_lightning.distributed.sharding import load_sharded_student
from lar_lightning.errors import SettingError
from lar_lightning.export.checkpoint import load_trained_student
from lar_lightning.models import student as student_file
from lar_lightning.models.prefixes import read
from lar_lightning.models.student import Student, load_student
from lar_lightning.module import LatentActionModule
from lar_lightning.recovery.checkpoints import META, read_checkpoint, shard_name
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import OnPolicySettings

ROOT = Path(__file__).parents[1]
SECONDS = 400
"""Many times what two processes need: one that hangs is a failure, not a wait."""
STEPS = (
    "--trainer.max_steps=4",
    "--trainer.max_epochs=-1",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.gradient_clip_val=0.05",
    "--trainer.limit_val_batches=2",
    "--trainer.num_sanity_val_steps=2",
    "--data.init_args.loading.batch_size=8",
    "--checkpoint.every_n_train_steps=2",
    "--checkpoint.filename={step}",
    "--checkpoint.save_top_k=-1",
)
MODES = ("rows", "lora", "full")
NATS = {"rows": 5e-5, "lora": 2e-6, "full": 2e-4}
"""Tolerance of losses. The norm that clips is a sum in another order; where rows or weights in
fp32 are read in bfloat16, a change in their last digit now and then rounds the other way."""
SHARE = {"rows": 1e-2, "lora": 1e-4, "full": 2e-2}
"""Tolerance of weights and moments: norm of the difference, as a share of the norm."""


@dataclass
class Whole:
    """A run in this process, with what it computed."""

    folder: Path
    losses: list[float] = field(default_factory=list)
    """Of each batch."""
    norms: list[float] = field(default_factory=list)
    """Of the gradients of each step, before they are clipped."""
    num_calls: list[int] = field(default_factory=list)
    """Of the backbone that would read each batch, were it not read whole."""


def run_alone(folder: Path, checkpoint: Path, *options: str) -> Whole:
    found = Whole(folder)
    step = LatentActionModule.training_step
    before_step = LatentActionModule.on_before_optimizer_step

    def read_whole(model: Any, ids: Any, mask: Any, **settings: Any) -> Any:
        return read(model, ids, mask, **{**settings, "is_whole": True})

    def noted(self: LatentActionModule, batch: Any, batch_idx: int) -> Any:
        loss = step(self, batch, batch_idx)
        found.losses.append(float(loss.detach()))
        found.num_calls.append(num_calls(self.student, batch))
        return loss

    def measured(self: LatentActionModule, optimizer: Any) -> None:
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        found.norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        before_step(self, optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student_file, "read", read_whole)
        patch.setattr(LatentActionModule, "training_step", noted)
        patch.setattr(LatentActionModule, "on_before_optimizer_step", measured)
        arguments = fit_arguments(folder, checkpoint, *STEPS, *options)
        assert main([*arguments, "--trainer.accumulate_grad_batches=2"]) == 0
    return found


@torch.no_grad()
def num_calls(student: Student, batch: DistillationBatch) -> int:
    calls: list[int] = []
    embedding: Any = student.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *_: calls.append(1))
    read(student.model, batch.student_ids, batch.student_mask, first_trained=student.base_size)
    handle.remove()
    return len(calls)


def run_in_two(folder: Path, checkpoint: Path, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = fit_arguments(folder, checkpoint, *STEPS, "--trainer.devices=2", *options)
    overlay = ["--config", "configs/strategy/fsdp.yaml", "--model.activation_checkpointing=false"]
    at = arguments.index("configs/quickstart.yaml") + 1
    command = [sys.executable, "-m", "lar_lightning", *arguments[:at], *overlay, *arguments[at:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # both processes of the run
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def ended_well(result: subprocess.CompletedProcess[str]) -> bool:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return True


def checkpoint_at(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step={step}.ckpt"


def assert_equal_states(path: Path, other: Path, mode: str) -> None:
    """Weights and the optimizer's moments, whichever form the checkpoints have."""
    found, expected = read_checkpoint(path), read_checkpoint(other)
    assert found["global_step"] == expected["global_step"] == 4
    pairs = [(found["state_dict"], expected["state_dict"])]
    states = [content["optimizer_states"][0]["state"] for content in (found, expected)]
    assert set(states[0]) == set(states[1])
    pairs += [(states[0][index], state) for index, state in states[1].items()]
    for ours, theirs in pairs:
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            difference = (ours[name] - value).norm() / value.norm().clamp_min(1e-12)
            assert float(difference) <= SHARE[mode], name


@pytest.fixture(scope="module")
def untied(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an output matrix of its own."""
    from transformers import AutoModelForCausalLM

    from lar_lightning.base_models import load_tokenizer

    folder = tmp_path_factory.mktemp("untied")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    config = model.config
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        other: Any = type(model)(config)
    other.generation_config = model.generation_config
    other.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(tiny_checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tiny_checkpoint: Path, untied: Path) -> dict[str, Path]:
    return {"rows": tiny_checkpoint, "lora": untied, "full": tiny_checkpoint}


@pytest.fixture(scope="module")
def starts(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rollouts whose prompts begin in four ways: batches fall into more groups or fewer."""
    folder = tmp_path_factory.mktemp("rolled_out")
    beginnings = tuple(f"{word} the text. " * 12 for word in ("return", "total", "user", "any"))
    made = {
        mode: make_tiny_run(folder / mode, bases[mode], beginnings) for mode in ("rows", "lora")
    }
    return {**made, "full": made["rows"]}


@pytest.fixture(scope="module")
def alone(
    bases: dict[str, Path], starts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Whole]:
    found = {}
    for mode in MODES:
        folder = tmp_path_factory.mktemp("alone") / mode
        shutil.copytree(starts[mode], folder)
        found[mode] = run_alone(folder, bases[mode], f"--model.trainable={mode}")
    return found


@pytest.fixture(scope="module")
def together(
    bases: dict[str, Path], alone: dict[str, Whole], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    found = {}
    for mode in MODES:
        found[mode] = copied(alone[mode], tmp_path_factory.mktemp("together") / mode)
        assert ended_well(run_in_two(found[mode], bases[mode], f"--model.trainable={mode}"))
    return found


def copied(run: Whole, folder: Path) -> Path:
    """Copy rollouts and vocabulary without what training has left."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("checkpoints", "logs"))
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_do_what_one_does(
    mode: str, alone: dict[str, Whole], together: dict[str, Path]
) -> None:
    """Losses step by step, weights and moments; gradients were clipped in each step."""
    assert min(alone[mode].norms) > 0.05
    of_batches = alone[mode].losses
    expected = [(a + b) / 2 for a, b in zip(of_batches[::2], of_batches[1::2], strict=True)]
    assert len(expected) == 4
    found = metrics_of(together[mode], "train/loss_nats")
    assert found == pytest.approx(expected, abs=NATS[mode], rel=0)
    assert_equal_states(
        checkpoint_at(together[mode], 4), checkpoint_at(alone[mode].folder, 4), mode
    )


def test_processes_whose_batches_share_prompts_otherwise_do_not_wait_for_each_other(
    alone: dict[str, Whole], together: dict[str, Path]
) -> None:
    """The trap: as many calls of a sharded layer as the batch of a process has groups."""
    calls = alone["rows"].num_calls
    assert any(a != b for a, b in zip(calls[::2], calls[1::2], strict=True))
    assert checkpoint_at(together["rows"], 4).is_dir()


def test_each_process_writes_its_share_and_nothing_of_the_frozen_model(
    together: dict[str, Path],
) -> None:
    folder = checkpoint_at(together["lora"], 4)
    names = {path.name for path in folder.iterdir()}
    assert names == {META, shard_name(0, 2), shard_name(1, 2)}
    sizes = [(folder / shard_name(rank, 2)).stat().st_size for rank in range(2)]
    state = read_checkpoint(folder)["state_dict"]
    num_bytes = 3 * sum(4 * value.numel() for value in state.values())  # weights, two moments
    assert sum(sizes) < num_bytes + 2**16
    assert max(sizes) < 0.6 * sum(sizes)
    assert all("lora_" in name or "rows." in name for name in state)


@pytest.mark.parametrize("mode", MODES)
def test_run_of_two_processes_goes_on_in_one(
    mode: str,
    bases: dict[str, Path],
    alone: dict[str, Whole],
    together: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = copied(alone[mode], tmp_path / "run")
    middle = f"--ckpt_path={checkpoint_at(together[mode], 2)}"
    resumed = run_alone(folder, bases[mode], f"--model.trainable={mode}", middle)
    assert resumed.losses == pytest.approx(alone[mode].losses[4:], abs=NATS[mode], rel=0)
    assert_equal_states(checkpoint_at(folder, 4), checkpoint_at(alone[mode].folder, 4), mode)


@pytest.mark.parametrize(("mode", "source"), [("full", "alone"), ("lora", "together")])
def test_run_goes_on_in_two_processes_and_may_be_written_as_one_file(
    mode: str,
    source: str,
    bases: dict[str, Path],
    alone: dict[str, Whole],
    together: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = copied(alone[mode], tmp_path / "run")
    begun = alone[mode].folder if source == "alone" else together[mode]
    result = run_in_two(
        folder,
        bases[mode],
        f"--model.trainable={mode}",
        f"--ckpt_path={checkpoint_at(begun, 2)}",
        "--trainer.strategy.init_args.save_distributed_checkpoint=false",
    )
    assert ended_well(result)
    assert checkpoint_at(folder, 4).is_file()
    assert_equal_states(checkpoint_at(folder, 4), checkpoint_at(alone[mode].folder, 4), mode)


def test_other_number_of_batches_a_step_is_refused(
    bases: dict[str, Path],
    alone: dict[str, Whole],
    together: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    folder = copied(alone["rows"], tmp_path / "run")
    middle = f"--ckpt_path={checkpoint_at(together['rows'], 2)}"
    assert main(fit_arguments(folder, bases["rows"], *STEPS, middle)) == 2
    said = capsys.readouterr().err
    assert "as many batches a step, got 1 for 2" in said
    assert "set that to 2" in said


def test_loss_that_is_not_finite_in_one_process_stops_all_of_them(
    bases: dict[str, Path], alone: dict[str, Whole], tmp_path: Path
) -> None:
    folder = copied(alone["rows"], tmp_path / "run")
    result = run_in_two(
        folder,
        bases["rows"],
        "--trainer.callbacks+=spoiling.NotANumber",
        "--checkpoint.every_n_train_steps=1",
    )
    assert result.returncode == 2
    assert "the loss must be finite, got nan at step 2: the folded term in" in result.stderr
    assert "(process 1)" in result.stderr
    assert read_checkpoint(checkpoint_at(folder, 2))["global_step"] == 2
    assert not checkpoint_at(folder, 3).exists()


def test_students_are_made_of_folders_as_of_files(
    bases: dict[str, Path], alone: dict[str, Whole], together: dict[str, Path]
) -> None:
    vocabulary = LatentVocabulary.load(alone["lora"].folder / "latent_vocabulary.json")
    folder, file = checkpoint_at(together["lora"], 4), checkpoint_at(alone["lora"].folder, 4)
    found, expected = (
        load_trained_student(bases["lora"], vocabulary, path).state_dict()
        for path in (folder, file)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=0)


@pytest.mark.parametrize("damage", ["no shard", "cut shard", "no meta"])
def test_folder_of_which_a_part_is_missing_is_refused(
    damage: str, together: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint_at(together["rows"], 4), tmp_path / "last.ckpt"))
    part = folder / (META if damage == "no meta" else shard_name(1, 2))
    if damage == "cut shard":
        part.write_bytes(part.read_bytes()[:-100])
    else:
        part.unlink()
    with pytest.raises(SettingError, match=r"must be a whole checkpoint, got .*last\.ckpt"):
        read_checkpoint(folder)


def test_sampling_is_refused_where_the_model_is_sharded() -> None:
    module = LatentActionModule("none", Path("none"), on_policy=OnPolicySettings(share=0.5))
    module.__dict__["_device_mesh"] = {"data_parallel": None}
    with pytest.raises(SettingError, match=r"`on_policy\.share` must be 0 where the model is"):
        module._checked_mesh()


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A group of this process alone."""
    from torch.distributed import FileStore  # type: ignore[attr-defined]
    from torch.distributed.device_mesh import init_device_mesh

    store = FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("trainable", MODES)
def test_student_loaded_in_shares_is_the_student_loaded_whole(
    name: str, trainable: Any, mesh: Any, tmp_path: Path
) -> None:
    """Weights, buffers that no file holds, adapters from chance, rows, and their scales."""
    random_model(ARCHITECTURES[name]).save_pretrained(tmp_path / "base")
    students: list[Student] = []
    for load in (load_student, load_sharded_student):
        torch.manual_seed(3)
        options = {"mesh": mesh} if load is load_sharded_student else {}
        students.append(load(tmp_path / "base", VOCABULARY, trainable=trainable, **options))
    expected, found = students
    parameters = {name: p.full_tensor() for name, p in found.named_parameters()}  # type: ignore[attr-defined]
    assert {n for n, _ in expected.named_parameters()} == set(parameters)
    for key, value in expected.named_parameters():
        torch.testing.assert_close(parameters[key], value, atol=0, rtol=0)
        assert dict(found.named_parameters())[key].requires_grad == value.requires_grad
    buffers = dict(found.named_buffers())
    for key, value in expected.named_buffers():
        torch.testing.assert_close(buffers[key], value, atol=0, rtol=0)
    scales = [[scale for _, scale in each.scaled_rows()] for each in students]
    assert scales[0] == scales[1]
