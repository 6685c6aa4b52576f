"""What is computed on a card is what is computed on the CPU. Skipped where there is no card."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_estimates import SMALL
from test_losses import LATENT_SETS, enumeration
from test_prefixes import SHARING
from test_student import VOCABULARY, module_of, student_of
from tiny_run import make_tiny_run
from toy_language import trajectory_of
from whole_runs import fit_arguments, metrics_of

from lar_lightning.__main__ import main
from lar_lightning.alignment import align
from lar_lightning.batches import collate
from lar_lightning.estimates.memory import memory_of
from lar_lightning.losses.distillation import Heads, distillation_loss
from lar_lightning.losses.folding import Folding
from lar_lightning.models import prefixes
from lar_lightning.models.scoring import entropies_of, load_scorer
from lar_lightning.policies.policy import Request, Sampling
from lar_lightning.policies.transformers_engine import open_transformers
from lar_lightning.run_folder import trajectory_path
from lar_lightning.settings import DistillationSettings
from lar_lightning.trajectories import read_trajectories
from tests.measured_steps import SmallStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card that PyTorch sees"),
]
ROOT = Path(__file__).parents[1]
STEPS = (
    "--trainer.max_epochs=-1",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_val_batches=2",
    "--trainer.num_sanity_val_steps=2",
    "--data.init_args.loading.batch_size=8",
)


@pytest.mark.parametrize("split", ["nll", "soft", "bernoulli"])
@pytest.mark.parametrize("segments", LATENT_SETS[2:6])
def test_loss_and_gradients_are_those_of_the_cpu(segments: tuple[str, ...], split: str) -> None:
    _, batch = enumeration(segments)
    folding = Folding([[ord(letter) - ord("a") for letter in text] for text in segments], 4)
    torch.manual_seed(0)
    rows, size = len(batch.targets), 6
    drawn = {
        "teacher": torch.randn(rows, size, dtype=torch.float64),
        "student": torch.randn(rows, size, dtype=torch.float64),
        "base": torch.randn(4, size, dtype=torch.float64),
        "latent": torch.randn(len(segments), size, dtype=torch.float64),
    }

    def loss_on(device: str) -> list[torch.Tensor]:
        values = {key: value.to(device).requires_grad_() for key, value in drawn.items()}
        loss, _ = distillation_loss(
            values["teacher"].detach(),
            values["student"],
            Heads(teacher=values["base"].detach(), base=values["base"], latent=values["latent"]),
            batch.to(torch.device(device)).targets,
            folding.to(device),
            settings=DistillationSettings(split=split),  # type: ignore[arg-type]
            rows_per_chunk=17,
        )
        loss.backward()
        gradients = [values[key].grad for key in ("student", "base", "latent")]
        return [item.cpu() for item in (loss.detach(), *gradients) if item is not None]

    found, expected = loss_on("cuda"), loss_on("cpu")
    assert len(found) == 4
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3-untied"])
def test_a_step_on_sequences_that_begin_alike_is_that_of_the_cpu(
    name: str, trainable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "LEAST_SAVING", 2)
    batch = collate([align(VOCABULARY, trajectory_of(text)) for text in SHARING])
    module = module_of(student_of(name, VOCABULARY, trainable=trainable))
    for parameter in module.student.other_parameters:  # adapters start as nothing
        torch.nn.init.normal_(parameter, std=0.1)
    values = {}
    for device in ("cpu", "cuda"):
        module.to(device).zero_grad()
        loss, _ = module.compare(batch.to(torch.device(device)), module.distillation)
        loss.backward()
        gradients = [p.grad for p in module.student.parameters() if p.grad is not None]
        # Cloned: a gradient moves along with its parameter.
        values[device] = [loss.detach().cpu(), *(item.cpu().clone() for item in gradients)]
    assert len(values["cuda"]) > 1
    torch.testing.assert_close(values["cuda"], values["cpu"], atol=1e-4, rtol=1e-3)


def test_a_run_goes_as_on_the_cpu_and_goes_on_from_its_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    losses = {}
    for accelerator in ("cpu", "gpu"):
        folder = make_tiny_run(tmp_path / accelerator, tiny_checkpoint)
        options = [*STEPS, f"--trainer.accelerator={accelerator}", "--model.trainable=lora"]
        arguments = fit_arguments(folder, tiny_checkpoint, *options)
        assert main([*arguments, "--trainer.max_steps=4"]) == 0
        assert main([*arguments, "--trainer.max_steps=6"]) == 0
        losses[accelerator] = metrics_of(folder, "train/loss_nats")
    assert len(losses["gpu"]) == 6
    # In bf16 both round, each in its own order.
    assert losses["gpu"] == pytest.approx(losses["cpu"], rel=0.02)


def test_a_sharded_run_of_one_process_is_a_plain_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    losses = {}
    for overlay in ((), ("--config", "configs/strategy/fsdp.yaml")):
        folder = make_tiny_run(tmp_path / f"{len(overlay)}", tiny_checkpoint)
        arguments = fit_arguments(folder, tiny_checkpoint, *STEPS, "--trainer.max_steps=4")
        at = arguments.index("configs/quickstart.yaml") + 1
        result = subprocess.run(
            [sys.executable, "-m", "lar_lightning", *arguments[:at], *overlay, *arguments[at:]],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": ":".join(map(str, (ROOT, ROOT / "tests", *sys.path)))},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        losses[bool(overlay)] = metrics_of(folder, "train/loss_nats")
    assert len(losses[True]) == 4
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
def test_memory_of_a_step_is_within_15_percent_of_what_the_card_hands_out(
    trainable: str, is_checkpointed: bool
) -> None:
    step = SmallStep(
        SMALL,
        trainable=trainable,
        num_tokens=1024,
        is_checkpointed=is_checkpointed,
        device="cuda",
    )
    step.run()  # libraries take their own at first
    torch.cuda.reset_peak_memory_stats()
    idle = torch.cuda.memory_allocated() - memory_held_by(step)
    step.run()
    measured = torch.cuda.max_memory_allocated() - idle
    assert memory_of(SMALL, step.workload).peak == pytest.approx(measured, rel=0.15)


def memory_held_by(step: SmallStep) -> int:
    """Return the bytes that a step leaves behind: weights, states and gradients."""
    states = [
        item
        for state in step.optimizer.state.values()
        for item in state.values()
        if torch.is_tensor(item) and item.is_cuda
    ]
    gradients = [item.grad for item in step.trained if item.grad is not None]
    return step.fixed_bytes + sum(item.numel() * item.element_size() for item in states + gradients)


def test_the_engine_of_transformers_reports_the_entropies_that_the_scorer_finds(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = make_tiny_run(tmp_path / "run", tiny_checkpoint)
    trajectories = read_trajectories(trajectory_path(folder, "train"))[:4]
    prompts = [[*map(int, item.token_ids[: item.spans[-1].start])] for item in trajectories]
    with open_transformers(tiny_checkpoint, num_concurrent=4, max_model_len=512) as policy:
        assert policy.model.device.type == "cuda"
        for number, prompt in enumerate(prompts):
            request = Request(request_id=str(number), prompt_ids=prompt, temperature=0.0)
            policy.submit(request, Sampling(max_tokens=16, with_entropies=True))
        written = {int(item.request_id): item for item in policy.step()}
    played = [
        replace(
            item,
            token_ids=np.asarray([*prompt, *written[number].token_ids], dtype=np.int32),
            entropies=np.full(len(prompt) + len(written[number].token_ids), np.nan, np.float32),
            spans=(
                *item.spans[:-1],
                replace(item.spans[-1], end=len(prompt) + len(written[number].token_ids)),
            ),
        )
        for number, (item, prompt) in enumerate(zip(trajectories, prompts, strict=True))
    ]
    with torch.inference_mode():
        scored = entropies_of(load_scorer(tiny_checkpoint), played)
    for number, (found, prompt) in enumerate(zip(scored, prompts, strict=True)):
        reported = written[number].entropies
        assert reported is not None
        # In bf16, with and without keys and values from before.
        np.testing.assert_allclose(found[len(prompt) :], reported, atol=0.03)
