"""Teacher and student shared out among processes (FSDP2), and loaded without ever being whole.

Each decoder layer is a group of its own: gathered where it is computed, freed behind it, gathered
again in backward. All else (both vocabulary matrices, new rows, norms) is the group of the root,
whole from the first pass of a step to the end of its backward, since the loss reads the matrices
outside any forward. Tied matrices are one parameter of that group. Gradients are averaged over
processes: a step of N processes is that of one process with `accumulate_grad_batches` N.

Groups are gathered by all processes together, so all must call them equally often: a batch is read
whole, without the shared beginnings of `prefixes`, whose number depends on the batch.

Dimensions: N rows of a parameter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lar_lightning.errors import SettingError
from lar_lightning.models.embeddings import Initialization, initial_rows
from lar_lightning.models.student import Student, Trainable
from lar_lightning.segments import LatentVocabulary

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

PASSES = ("student_hidden", "teacher_hidden", "check_head")
"""Methods of a student that read with the model: the root is gathered for them."""


def load_sharded_student(
    checkpoint: Path,
    vocabulary: LatentVocabulary,
    mesh: "DeviceMesh",
    *,
    trainable: Trainable = "rows",
    dtype: torch.dtype = torch.bfloat16,
    initialization: Initialization = "constituents",
    **options: Any,
) -> Student:
    """Return what `load_student` returns, of whose weights each process has read its share alone.

    Models are made without memory for their weights, extended, shared out, and then filled.
    """
    models = [hollow_model(checkpoint, torch.float32 if trainable == "full" else dtype)]
    if trainable == "full":
        models.append(hollow_model(checkpoint, dtype))
        options["teacher"] = models[1]
    # Extending a model moves its modules to other names, but keeps them.
    names: list[dict[nn.Module, str]] = [
        {module: name for name, module in model.named_modules()} for model in models
    ]
    student = Student(models[0], vocabulary, trainable=trainable, is_hollow=True, **options)
    shard(student, mesh)
    for of_model in names:
        fill(of_model, checkpoint)
    with whole(student) as root:
        matrices = (root.model.get_input_embeddings().weight, root.heads.base)
        starts = [
            initial_rows(matrix[: student.base_size], vocabulary.segments, side, initialization)
            for matrix, side in zip(matrices, ("input", "output"), strict=True)
        ]
        student.remember_scales()
    for rows, start in zip(
        (student.rows.input_rows, student.rows.output_rows), starts, strict=True
    ):
        own = local_rows(len(start), mesh)
        rows.to_local().detach().copy_(start[own])  # type: ignore[attr-defined]
    student.check_head()
    student.reshard()  # type: ignore[operator]
    return student


def shard(student: Student, mesh: "DeviceMesh") -> None:
    """Share out a student among the processes of a mesh of one dimension."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for model in (student.model, student.teacher):
        for layer in decoder_layers(model) if model is not None else ():
            _solidify(layer, mesh)
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    _solidify(student, mesh)
    root: Any = fully_shard(student, mesh=mesh, reshard_after_forward=False)
    # Where processes use different parts of a layer, as in a mixture of experts, all still send.
    root.set_reduce_scatter_unused_params(True)
    for name in PASSES:
        register_fsdp_forward_method(student, name)
    student.is_sharded = True


@torch.no_grad()
def _solidify(module: nn.Module, mesh: "DeviceMesh") -> None:
    """Give a group's hollow weights memory, for the moment in which they are shared out."""
    for parameter in module.parameters():
        if parameter.numel() and not any(parameter.stride()):
            parameter.data = torch.empty(
                parameter.shape, dtype=parameter.dtype, device=mesh.device_type
            )


def decoder_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """Return a model's decoder layers.

    Raises:
        SettingError: if it has no list of them.
    """
    layers = getattr(getattr(model, model.base_model_prefix), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise SettingError(
            "`base_model` must have a list of decoder layers named `layers`, got "
            f"{type(model).__name__} without. Choose another architecture, or train without "
            "`trainer.strategy` and `model.activation_checkpointing`."
        )
    return layers


@contextmanager
def whole(student: Student) -> Iterator[Any]:
    """Gather the root's group for a while, in all processes together."""
    root: Any = student
    root.unshard()
    try:
        yield student
    finally:
        root.reshard()


def local_rows(num_rows: int, mesh: "DeviceMesh") -> slice:
    """Return which rows of a parameter are this process's; the last may have fewer, or none."""
    share = -(-num_rows // mesh.size())
    start = min(mesh.get_local_rank() * share, num_rows)
    return slice(start, min(start + share, num_rows))


def as_shard(local: Tensor, shape: torch.Size, mesh: "DeviceMesh") -> Tensor:
    """Return this process's rows as part of a tensor of `shape`."""
    from torch.distributed.tensor import DTensor, Shard

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local.contiguous(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
    )


def hollow_model(checkpoint: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """Return a model whose weights have their shapes and no memory; its buffers are real.

    Weights are one number each, repeated: unlike the meta device, what is made beside them, such
    as adapters, is made as it always is.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(checkpoint)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # each assignment in there has made a parameter anew
    if (checkpoint / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    hollow: dict[int, nn.Parameter] = {}  # tied weights stay one parameter
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in hollow:
                number = torch.zeros((), dtype=parameter.dtype)
                hollow[id(parameter)] = nn.Parameter(number.expand(parameter.shape))
            if parameter is not None:
                module._parameters[name] = hollow[id(parameter)]
    return model


@torch.no_grad()
def fill(names: dict[nn.Module, str], checkpoint: Path) -> None:
    """Read this process's rows of a sharded model's weights from a checkpoint.

    Args:
        names: Of the model's modules when it was plain.
        checkpoint: Folder with safetensors.
    """
    from torch.distributed.tensor import DTensor

    parameters: dict[str, Tensor] = {}
    seen: set[int] = set()
    for module, prefix in names.items():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                parameters[f"{prefix}.{name}".lstrip(".")] = parameter
            seen.add(id(parameter))
    weights = stored_weights(checkpoint, set(parameters))
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor), f"{name} is shared out"
        parameter.to_local().copy_(weights(name, local_rows(len(parameter), parameter.device_mesh)))


def stored_weights(checkpoint: Path, names: set[str]) -> Any:
    """Return a function from a weight's name and a range of its rows to these rows.

    Only they are read. Where an architecture keeps its weights under other names on disk than in
    memory, the whole model is read first, by every process.
    """
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    if names <= set(files):

        def rows_of(name: str, rows: slice) -> Tensor:
            with safe_open(files[name], framework="pt") as file:
                return file.get_slice(name)[rows]

        return rows_of
    from lightning.pytorch.utilities import rank_zero_warn
    from transformers import AutoModelForCausalLM

    rank_zero_warn(
        f"{checkpoint} names its weights otherwise than the model does (it has no "
        f"{min(names - set(files))}): every process reads all of it, in its memory."
    )
    whole_model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    loaded = dict(whole_model.named_parameters(remove_duplicate=False))
    return lambda name, rows: loaded[name][rows]
