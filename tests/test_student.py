"""Students of every architecture that the Hugging Face interface serves alike."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_language import trajectory_of, vocabulary_of
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from lar_lightning.alignment import align
from lar_lightning.batches import DistillationBatch, collate
from lar_lightning.errors import SettingError
from lar_lightning.export.checkpoint import extended_model
from lar_lightning.models.student import Student, load_student
from lar_lightning.module import LatentActionModule
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import DistillationSettings

SHAPE: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
ARCHITECTURES = {
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "qwen3-untied": Qwen3Config(**SHAPE, tie_word_embeddings=False),
    "gemma": GemmaConfig(**SHAPE),
    "gemma3": Gemma3TextConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, tie_word_embeddings=False),
}
VOCABULARY = vocabulary_of("ab", "abc", "ca")
EMPTY = vocabulary_of()
TEXTS = ["abcabd", "caabd", "bcabcacd", "d"]
ALL = pytest.mark.parametrize("name", ARCHITECTURES)
SETS = pytest.mark.parametrize("trainable", ["rows", "lora", "full"])


def random_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32)


def student_of(name: str, vocabulary: LatentVocabulary, **options: Any) -> Student:
    config = ARCHITECTURES[name]
    if options.get("trainable") == "full":
        options["teacher"] = random_model(config)
    return Student(random_model(config), vocabulary, **options)


def module_of(student: Student, **options: Any) -> LatentActionModule:
    module = LatentActionModule("unused", Path("unused"), **options)
    module.student = student
    return module


def batch_of(vocabulary: LatentVocabulary) -> DistillationBatch:
    return collate([align(vocabulary, trajectory_of(text)) for text in TEXTS])


def unit_logits_of(student: Student, units: Tensor) -> Tensor:
    hidden = student.student_hidden(units, torch.ones_like(units))
    heads = student.heads
    return torch.cat([hidden @ heads.base.T, hidden @ heads.latent.T], 2)


class Steps:
    """Takes training steps as Lightning would, without a Trainer."""

    def __init__(self, module: LatentActionModule) -> None:
        self.module = module
        module.__dict__["_trainer"] = None
        rows = list(module.student.rows.parameters())
        groups: list[dict[str, Any]] = [{"params": rows, "weight_decay": 0.0}]
        if module.student.other_parameters:
            groups.append({"params": module.student.other_parameters, "weight_decay": 0.5})
        self.optimizer = torch.optim.AdamW(groups, lr=0.02)

    def take(self, batch: DistillationBatch, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            self.optimizer.zero_grad()
            loss, _ = self.module.compare(batch, self.module.distillation)
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses


@ALL
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_student_without_latents_starts_as_its_teacher(name: str, trainable: str) -> None:
    module = module_of(student_of(name, EMPTY, trainable=trainable))
    loss, terms = module.compare(batch_of(EMPTY))
    assert abs(float(loss.detach())) < 1e-6
    assert terms.agrees.all()


def test_rows_alone_without_latents_are_refused() -> None:
    with pytest.raises(SettingError, match=r"model\.trainable"):
        student_of("llama-tied", EMPTY, trainable="rows")


@ALL
@SETS
def test_training_lowers_the_loss_and_leaves_the_teacher_alone(name: str, trainable: str) -> None:
    student = student_of(name, VOCABULARY, trainable=trainable)
    batch = batch_of(VOCABULARY)
    teacher = student.teacher_hidden(batch.teacher_ids, batch.teacher_mask)
    losses = Steps(module_of(student)).take(batch, 12)
    assert losses[-1] < 0.97 * losses[0]
    torch.testing.assert_close(
        student.teacher_hidden(batch.teacher_ids, batch.teacher_mask), teacher, atol=0, rtol=0
    )


@ALL
@pytest.mark.parametrize("trainable", ["rows", "lora"])
def test_new_rows_move_and_old_weights_do_not_under_weight_decay(name: str, trainable: str) -> None:
    """The trap: `requires_grad` on a slice, or decay that shrinks what gets no gradient."""
    student = student_of(name, VOCABULARY, trainable=trainable)
    frozen = {n: p.clone() for n, p in student.named_parameters() if not p.requires_grad}
    rows = [row.detach().clone() for row in student.rows.parameters()]
    Steps(module_of(student)).take(batch_of(VOCABULARY), 3)
    for before, after in zip(rows, student.rows.parameters(), strict=True):
        assert (before - after).abs().amax(1).min() > 0
    now = dict(student.named_parameters())
    assert frozen
    assert all(torch.equal(now[n], before) for n, before in frozen.items())


@ALL
@SETS
def test_export_reads_back_as_the_student(name: str, trainable: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    student = student_of(name, VOCABULARY, trainable=trainable)
    Steps(module_of(student)).take(batch_of(VOCABULARY), 3)
    units = torch.tensor([[3, 4, 0, 6, 2, 5, 1], [3, 0, 0, 2, 1, 4, 5]])
    rows = student.rows
    with torch.no_grad():
        expected = unit_logits_of(student, units)
        model = extended_model(student.release(), rows.input_rows, rows.output_rows, 4)
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.tie_word_embeddings is False
    with torch.no_grad():
        found = loaded(input_ids=units).logits[..., : expected.shape[2]]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@ALL
def test_full_training_reaches_the_base_head_through_the_chunked_loss(name: str) -> None:
    """Autograd of the definition: every gradient of the base weights is that of plain logits."""
    from lar_lightning.losses.folding import row_terms

    batch = batch_of(VOCABULARY)
    chunked, plain = (student_of(name, VOCABULARY, trainable="full") for _ in range(2))
    module_of(chunked, rows_per_chunk=3).compare(batch)[0].backward()
    hidden = plain.student_hidden(batch.student_ids, batch.student_mask)
    hidden = hidden.flatten(0, 1)[batch.student_rows]
    teacher = plain.teacher_hidden(batch.teacher_ids, batch.teacher_mask)
    terms = row_terms(
        teacher.flatten(0, 1)[batch.teacher_rows] @ plain.heads.teacher.T,
        hidden @ plain.heads.base.T,
        hidden @ plain.heads.latent.T,
        batch.targets,
        plain.folding,
    )
    (terms.folded + terms.split).mean().backward()
    expected = dict(plain.named_parameters())
    for parameter_name, parameter in chunked.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, expected[parameter_name].grad, atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize("initializer_range", [0.01, 0.3])
def test_architecture_that_caps_its_logits_is_refused(initializer_range: float) -> None:
    """Also where the logits are so small that the cap leaves them alone."""
    config = Gemma2Config(**{**SHAPE, "initializer_range": initializer_range})
    with pytest.raises(SettingError, match="Gemma2"):
        Student(random_model(config), VOCABULARY)


def test_embedding_that_scales_is_read_alike_for_base_tokens_and_latents() -> None:
    student = student_of("gemma3", VOCABULARY)
    embedding: Any = student.model.get_input_embeddings()
    with torch.no_grad():
        student.rows.input_rows[0] = embedding.weight[2]
    units = torch.tensor([[3, 2, 1], [3, 4, 1]])
    hidden = student.student_hidden(units, torch.ones_like(units))
    torch.testing.assert_close(hidden[0], hidden[1], atol=1e-5, rtol=1e-5)


def test_full_needs_no_tie_to_be_told() -> None:
    """Tied matrices stay one parameter, and their rows for latents two."""
    student = student_of("llama-tied", VOCABULARY, trainable="full")
    names = student.trained_state()
    assert sum(tensor.shape == (12, 32) for tensor in names.values()) == 1
    assert {"rows.input_rows", "rows.output_rows"} <= set(names)


def test_weight_decay_and_rates_reach_their_own_parameters() -> None:
    class Trainer:
        estimated_stepping_batches = 10
        fit_loop = SimpleNamespace()

    expected = {"lora": (0.2, 0.7), "full": (0.3, 0.7)}
    for trainable in ("lora", "full"):
        student = student_of("qwen3-untied", VOCABULARY, trainable=trainable)
        module = module_of(
            student,
            learning_rate=0.1,
            lora_learning_rate=0.2,
            base_learning_rate=0.3,
            weight_decay=0.7,
            distillation=DistillationSettings(),
        )
        module.__dict__["_trainer"] = Trainer()
        found: Any = module.configure_optimizers()
        inputs, outputs, matrices, *vectors = found["optimizer"].param_groups
        assert inputs["params"][0] is student.rows.input_rows
        assert outputs["params"][0] is student.rows.output_rows
        embedding: Any = student.model.get_input_embeddings()
        matrices_of = (embedding.weight[: student.base_size], student.heads.base)
        for matrix, rows in zip(matrices_of, (inputs, outputs), strict=True):
            scale = float(matrix.detach().square().mean().sqrt())
            assert rows["initial_lr"] == pytest.approx(0.1 * scale, rel=1e-5)
            assert rows["weight_decay"] == 0
        assert (matrices["initial_lr"], matrices["weight_decay"]) == expected[trainable]
        assert all(group["weight_decay"] == 0 for group in vectors)
        assert len(vectors) == (trainable == "full")


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("rows_per_chunk", 0, "at least 1"),
        ("weight_decay", -1.0, "at least 0"),
        ("warmup_share", 1.0, "0..1 without 1"),
        ("learning_rate", 0.0, "above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(option: str, value: Any, rule: str) -> None:
    with pytest.raises(SettingError, match=f"`model.{option}` must .*{rule}.*, got {value}"):
        LatentActionModule("unused", Path("unused"), **{option: value})


def test_chunks_of_rows_suit_the_device_unless_they_are_chosen() -> None:
    module = LatentActionModule("unused", Path("unused"))
    assert module.rows_per_chunk == 64
    assert module.to("meta").rows_per_chunk == 1024
    assert LatentActionModule("unused", Path("unused"), rows_per_chunk=7).rows_per_chunk == 7


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_loading_in_bfloat16_leaves_the_rotary_frequencies_alone(
    trainable: Any, tiny_checkpoint: Path, tiny_tokenizer: Any
) -> None:
    """The trap: `.to(bfloat16)` on a live model rounds them, too."""
    vocabulary = LatentVocabulary([], base_size=len(tiny_tokenizer))
    student = load_student(tiny_checkpoint, vocabulary, trainable=trainable)
    frequencies = [b for name, b in student.named_buffers() if name.endswith("inv_freq")]
    exact = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert frequencies
    for found in frequencies:
        torch.testing.assert_close(found, exact)
    dtypes = {p.dtype for p in student.parameters() if not p.requires_grad}
    assert dtypes == {torch.bfloat16}
