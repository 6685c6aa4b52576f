"""The student's weights as a checkpoint names them, at any moment of its training.

An engine is opened on them, and given those that training has changed since. The student stays as
it is: adapters are merged on the way out, tensor by tensor.

Dimensions: V base tokens, K latents, D hidden units, O and I output and input units of a layer.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lar_lightning.models.embeddings import merged_matrix
from lar_lightning.models.student import Student


@torch.no_grad()
def served_weights(student: Student, *, changed_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of the untied checkpoint of V + K units, in the teacher's precision.

    Spare rows of the base model are left out: nothing that is not a unit can be written.

    Args:
        student: As it is now.
        changed_only: Only what training changes: both matrices where `rows` are trained. Adapters
            are on all layers, so with `lora`, as with `full`, that is everything.
    """
    model, dtype = student.model, student.heads.teacher.dtype
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [_name_of(model, module) for module in modules]
    rows = (student.rows.input_rows, student.rows.output_rows)
    for name, module, latents in zip(names, modules, rows, strict=True):
        base = module.weight[: student.base_size].to(dtype)
        yield f"{name}.weight", merged_matrix(base, latents, student.base_size)
    if changed_only and student.adapters is student.teacher is None:
        return
    for name, parameter in model.named_parameters():
        # Names below the input embedding are those of its base and its rows.
        if not name.startswith(tuple(f"{matrix}." for matrix in names)) and ".lora_" not in name:
            yield name.replace(".base_layer.", "."), _merged(model, name, parameter).to(dtype)


def _merged(model: torch.nn.Module, name: str, parameter: Tensor) -> Float[Tensor, "..."]:
    """Add to a layer's weight (O I) what its adapter adds; the sum is rounded once."""
    layer, is_adapted, kind = name.rpartition(".base_layer.")
    if not is_adapted or kind != "weight":
        return parameter
    adapted: Any = model.get_submodule(layer)
    return parameter + adapted.get_delta_weight(*adapted.active_adapters)


def _name_of(model: torch.nn.Module, module: torch.nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def write_served(student: Student, folder: Path) -> None:
    """Write the checkpoint without a tokenizer, for an engine that reads and writes ids."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    config: Any = deepcopy(student.model.config)
    config.vocab_size = student.base_size + len(student.rows.input_rows)
    config.tie_word_embeddings = False
    config.architectures = [type(student.model).__name__]
    config.save_pretrained(folder)
    # The engine stops where this says, and nowhere else.
    GenerationConfig(eos_token_id=sorted(student.stop_units) or None).save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in served_weights(student)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
