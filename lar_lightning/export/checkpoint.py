"""The trained student as an ordinary checkpoint that stock engines serve (algorithm 3).

New rows stand behind the base vocabulary in both matrices, the tie of input and output is
dissolved (and the config says so), adapters are merged, and the tokenizer knows each latent by its
segment's text. Nothing of ours is needed to run it.

An export is checked before it takes its place: it is loaded from disk and held against the student
(`export_checks`). There is never more than one copy of the model in memory.
"""

import gc
import json
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lar_lightning.artefacts import replacing_folder, write_json, write_text
from lar_lightning.base_models import load_tokenizer
from lar_lightning.errors import SettingError
from lar_lightning.export.checks import check_export, probes_of, reference_of
from lar_lightning.export.model_card import model_card
from lar_lightning.models.embeddings import merged_matrix
from lar_lightning.models.student import Student, load_student
from lar_lightning.recovery.checkpoints import (
    check_checkpoint,
    modified,
    newest_whole,
    read_checkpoint,
)
from lar_lightning.run_folder import (
    base_checkpoint,
    checkpoint_path,
    export_path,
    identity_of,
    vocabulary_path,
)
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tokenizer import check_texts, extend_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOURCE_FILE = "lar_lightning.json"
"""In the export: what it was made from, and what its check has found."""
CARD_FILE = "README.md"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Of the base model; they go with its weights."""
MAX_SHARD_SIZE = "5GB"

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How and where an export is written."""

    export_dir: Path | None = None
    """Its folder; None is `export` in the run's."""
    dtype: Dtype | None = None
    """Of its weights; None takes an export as it is, and writes a new one as the base model is."""
    max_shard_size: str | None = None
    """Largest file of weights, such as 500MB; None takes an export as it is, and writes 5GB."""
    push_to_hub: str | None = None
    """Repository that it is put into; None puts it nowhere."""

    def __post_init__(self) -> None:
        if self.max_shard_size is not None:
            _check_size(self.max_shard_size)


def _check_size(size: str) -> None:
    number, unit = size[:-2].strip(), size[-2:].upper()
    is_number = number.replace(".", "", 1).isdecimal() and float(number) > 0
    if not is_number or unit not in ("KB", "MB", "GB", "TB"):
        raise SettingError(
            f"`max_shard_size` must be a size in KB, MB, GB or TB, got {size!r}. Write {'5GB'!r}, "
            "for instance."
        )


def export_run(
    base_model: str,
    run_dir: Path,
    ckpt_path: Path | None = None,
    options: ExportOptions = ExportOptions(),
) -> Path:
    """Write the run's student as a checkpoint and return its folder; an up-to-date one is reused.

    Raises:
        SettingError: if there is no finished training checkpoint, it belongs to another base model
        or vocabulary, the folder holds something else, or the export is not what was trained.
    """
    if options.push_to_hub is not None:
        from lar_lightning.export.hub import check_hub

        check_hub(options.push_to_hub)
    last = checkpoint_path(run_dir)
    source = ckpt_path or newest_whole(last) or last
    target = options.export_dir or export_path(run_dir)
    if not source.exists():
        raise SettingError(
            f"`run_dir` must hold a trained student, but there is no {source}. Run the verb `fit` "
            "first."
        )
    origin = read_origin(target)
    _check_target(target, origin, run_dir)
    vocabulary = LatentVocabulary.load(vocabulary_path(run_dir))
    base = base_checkpoint(base_model)
    check_texts(load_tokenizer(base), vocabulary)
    made_from = {
        "checkpoint": source.name,
        "modified": modified(source),
        **identity_of(base, vocabulary),
    }
    if _is_up_to_date(origin, made_from, options):
        print(f"export: reused {target} ({origin['dtype']})", flush=True)
    else:
        student = load_trained_student(base, vocabulary, source, must_be_finished=ckpt_path is None)
        served = vocabulary.first(student.num_active)
        probes = probes_of(served, run_dir, student.max_length)
        reference = reference_of(student, probes)
        dtype = options.dtype or str(student.heads.teacher.dtype).removeprefix("torch.")
        shards = options.max_shard_size or MAX_SHARD_SIZE
        with replacing_folder(target) as temporary:
            write_checkpoint(
                student,
                served,
                base,
                temporary,
                dtype=getattr(torch, dtype),
                max_shard_size=shards,
            )
            del student
            gc.collect()  # adapters stand in circles
            checks = check_export(temporary, base, served, reference, run_dir)
            origin = {
                "run": _name_of(run_dir),
                "made_from": made_from,
                "dtype": dtype,
                "max_shard_size": shards,
                "checks": checks,
            }
            write_json(temporary / SOURCE_FILE, origin)
        print(f"export: made {target} from {source} ({checks['summary']})", flush=True)
    served = LatentVocabulary.load(vocabulary_path(target))
    _write_card(target, base_model, base, served, run_dir, origin)
    if options.push_to_hub is not None:
        from lar_lightning.export.hub import push

        push(target, options.push_to_hub)
    return target


def read_origin(folder: Path) -> dict[str, Any]:
    """Return what an export was made from; empty where there is none, or one of an older form."""
    try:
        origin = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return origin if isinstance(origin, dict) and "made_from" in origin else {}


def _name_of(run_dir: Path) -> str:
    """Return digits that tell runs of a machine apart, and nothing about the machine."""
    return sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]


def _check_target(target: Path, origin: dict[str, Any], run_dir: Path) -> None:
    """Refuse a folder that holds anything but an export of this run."""
    is_own = (target / SOURCE_FILE).is_file() and (
        target == export_path(run_dir) or origin.get("run") == _name_of(run_dir)
    )
    if (target.exists() or target.is_symlink()) and not is_own:
        raise SettingError(
            f"`export_dir` must be a folder that does not exist yet, or this run's own export, got "
            f"{target}, which holds something else. Choose another, or remove it."
        )


def _is_up_to_date(
    origin: dict[str, Any], made_from: dict[str, Any], options: ExportOptions
) -> bool:
    asked = {"dtype": options.dtype, "max_shard_size": options.max_shard_size}
    return origin.get("made_from") == made_from and all(
        value is None or origin.get(key) == value for key, value in asked.items()
    )


def _write_card(
    target: Path,
    base_model: str,
    base: Path,
    vocabulary: LatentVocabulary,
    run_dir: Path,
    origin: dict[str, Any],
) -> None:
    """Write the card, or bring it up to what has been evaluated since."""
    card = model_card(base_model, base, vocabulary, run_dir, origin)
    path = target / CARD_FILE
    if not path.exists() or path.read_text(encoding="utf-8") != card:
        write_text(path, card)


def load_trained_student(
    base: Path, vocabulary: LatentVocabulary, checkpoint: Path, *, must_be_finished: bool = False
) -> Student:
    """Load a base model and put a training checkpoint's rows and adapters into it.

    Raises:
        SettingError: if the checkpoint belongs to others, or is to be of a finished run and is not.
    """
    # Mapped, so that the optimizer's state, which is larger than the model, is never read.
    content: dict[str, Any] = read_checkpoint(
        checkpoint, lambda shape, rows: rows(slice(0, shape[0]))
    )
    settings = content.get("latent_actions", {}).get("settings", {})
    check_checkpoint(content, identity_of(base, vocabulary), settings)
    if must_be_finished:
        check_finished(content, checkpoint)
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


def check_finished(content: dict[str, Any], checkpoint: Path) -> None:
    """Refuse the checkpoint of a run that was stopped before its last step."""
    num_done = content["global_step"]
    num_steps = content["latent_actions"].get("num_steps", num_done)
    if num_done < num_steps:
        raise SettingError(
            f"`run_dir` must hold a run that is trained to its end, got one stopped at step "
            f"{num_done} of {num_steps}. Run the verb `fit` again, which goes on from there, or "
            f"export it as it is with `--ckpt_path {checkpoint}`."
        )


def write_checkpoint(
    student: Student,
    vocabulary: LatentVocabulary,
    base: Path,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write model, tokenizer and latent vocabulary into `folder`; uses up the student.

    Weights are written in `dtype`; None is the precision of the base model, also where its weights
    were trained in another. Of more rows than the vocabulary has latents, the first are written.
    """
    num_latents = len(vocabulary)
    rows = [matrix[:num_latents] for matrix in (student.rows.input_rows, student.rows.output_rows)]
    dtype = dtype or student.heads.teacher.dtype
    student.teacher = None
    if dtype == torch.float32:
        _cast(student.model, dtype)  # before adapters are added, so that the sum is not rounded
    model = student.release()
    _cast(model, dtype)
    model = extended_model(model, *rows, base_size=vocabulary.base_size)
    tokenizer = extend_tokenizer(load_tokenizer(base), vocabulary)
    assert len(tokenizer) <= model.config.vocab_size
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    vocabulary.save(folder / "latent_vocabulary.json")
    generation = base / "generation_config.json"
    if generation.exists():  # word for word
        shutil.copyfile(generation, folder / generation.name)
    for pattern in LICENCE_FILES:
        for file in base.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters one by one; not buffers, which hold frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


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
