"""The trained student as an ordinary checkpoint that stock engines serve (algorithm 3).

New rows stand behind the base vocabulary in both matrices, the tie of input and output is
dissolved (and the config says so), adapters are merged, and the tokenizer knows each latent by its
segment's text. Nothing of ours is needed to run it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lar_lightning.artefacts import replacing_folder
from lar_lightning.base_models import load_tokenizer
from lar_lightning.embeddings import merged_matrix
from lar_lightning.errors import SettingError
from lar_lightning.module import check_checkpoint
from lar_lightning.runs import (
    base_checkpoint,
    checkpoint_path,
    export_path,
    identity_of,
    vocabulary_path,
)
from lar_lightning.segments import LatentVocabulary
from lar_lightning.student import Student, load_student
from lar_lightning.tokenizer import extend_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOURCE_FILE = "lar_lightning.json"
"""In the export: which training checkpoint it was made from."""


def export_run(base_model: str, run_dir: Path, ckpt_path: Path | None = None) -> Path:
    """Write the run's student as a checkpoint and return its folder; an up-to-date one is reused.

    Raises:
        SettingError: if there is no training checkpoint, or it belongs to another base model or
        vocabulary.
    """
    source = ckpt_path or checkpoint_path(run_dir)
    target = export_path(run_dir)
    if not source.exists():
        raise SettingError(
            f"`run_dir` must hold a trained student, but there is no {source}. Run the verb `fit` "
            "first."
        )
    made_from = f"{source} {source.stat().st_mtime_ns}"
    if (target / SOURCE_FILE).exists() and (target / SOURCE_FILE).read_text(
        encoding="utf-8"
    ) == made_from:
        print(f"export: reused {target}", flush=True)
        return target
    base = base_checkpoint(base_model)
    vocabulary = LatentVocabulary.load(vocabulary_path(run_dir))
    student = load_trained_student(base, vocabulary, source)
    vocabulary = vocabulary.first(student.num_active)
    with replacing_folder(target) as temporary:
        write_checkpoint(student, vocabulary, base, temporary)
        (temporary / SOURCE_FILE).write_text(made_from, encoding="utf-8")
    print(f"export: made {target} from {source}", flush=True)
    return target


def load_trained_student(base: Path, vocabulary: LatentVocabulary, checkpoint: Path) -> Student:
    """Load a base model and put a training checkpoint's rows and adapters into it."""
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    settings = content.get("latent_actions", {}).get("settings", {})
    check_checkpoint(content, identity_of(base, vocabulary), settings)
    student = load_student(
        base, vocabulary, trainable=settings["trainable"], lora_rank=settings["lora_rank"]
    )
    state = {
        name.removeprefix("student."): tensor for name, tensor in content["state_dict"].items()
    }
    missing = set(student.trained_state()) ^ set(state)
    assert not missing, (
        f"a checkpoint of the same settings has the same parameters, got {sorted(missing)[:3]}"
    )
    student.load_state_dict(state, strict=False)
    student.activate(content["latent_actions"].get("num_active", len(vocabulary)))
    return student


def write_checkpoint(
    student: Student, vocabulary: LatentVocabulary, base: Path, folder: Path
) -> None:
    """Write model, tokenizer and latent vocabulary into `folder`; uses up the student.

    Of more rows than the vocabulary has latents, the first are written.
    """
    teacher = student.teacher
    rows = [
        matrix[: len(vocabulary)] for matrix in (student.rows.input_rows, student.rows.output_rows)
    ]
    model = extended_model(student.release(), *rows, base_size=vocabulary.base_size)
    if teacher is not None:
        # Trained in fp32, served as the base model is. Parameters only: buffers hold frequencies.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(teacher.dtype)
    tokenizer = extend_tokenizer(load_tokenizer(base), vocabulary)
    assert len(tokenizer) <= model.config.vocab_size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vocabulary.save(folder / "latent_vocabulary.json")


@torch.no_grad()
def extended_model(
    model: "PreTrainedModel", input_rows: torch.Tensor, output_rows: torch.Tensor, base_size: int
) -> "PreTrainedModel":
    """Put latent rows into a model's own two matrices, which are separate afterwards."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    inputs = merged_matrix(embedding.weight, input_rows, base_size)
    outputs = merged_matrix(head.weight, output_rows, base_size)
    # Assigning to the embedding module keeps its class, which may scale what it reads.
    embedding.weight = nn.Parameter(inputs)
    embedding.num_embeddings = len(inputs)
    extended_head = nn.Linear(outputs.shape[1], len(outputs), bias=False)
    extended_head.weight = nn.Parameter(outputs)
    model.config.vocab_size = len(inputs)
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(extended_head)
    return model
