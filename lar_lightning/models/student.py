"""Teacher and student in one set of weights, where possible.

The base model with rows for latents, and adapters that can be set aside. Only where the base
weights are trained too does the teacher need a copy of its own.

Dimensions: B trajectories, T or S positions, D hidden units.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lar_lightning.errors import SettingError
from lar_lightning.losses.distillation import Folding, Heads
from lar_lightning.models.embeddings import (
    ExtendedEmbedding,
    Initialization,
    LatentRows,
    initialize_rows,
    root_mean_square,
)
from lar_lightning.models.prefixes import read
from lar_lightning.models.switches import CASTS_INPUT, DISABLED, adapted_layers, switched
from lar_lightning.segments import LatentVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Trainable = Literal["rows", "lora", "full"]


class Student(nn.Module):
    """A causal language model whose vocabulary is extended by latents.

    The teacher is the same module read on base ids with adapters off, or `teacher`.
    """

    unit_lengths: Int[Tensor, " K1"]

    def __init__(
        self,
        model: "PreTrainedModel",
        vocabulary: LatentVocabulary,
        *,
        trainable: Trainable = "rows",
        lora_rank: int = 16,
        initialization: Initialization = "constituents",
        teacher: "PreTrainedModel | None" = None,
        is_hollow: bool = False,
    ) -> None:
        """Take over a base model and add rows.

        `rows` freezes the model, `lora` puts adapters on all its linear layers, `full` trains it
        and needs its frozen copy as `teacher`. A hollow model has its weights later: they are not
        looked at.
        """
        super().__init__()
        self.is_sharded = False
        if not len(vocabulary) and trainable == "rows":
            raise SettingError(
                "`model.trainable` must be lora or full where there are no latent actions, got "
                "rows: nothing would be trained."
            )
        assert (teacher is not None) == (trainable == "full"), "a trained model needs a teacher"
        model.requires_grad_(trainable == "full")
        if not is_hollow:
            check_plain_head(model)
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        self.rows = LatentRows(len(vocabulary), embedding.weight.shape[1])
        base_size = vocabulary.base_size
        if not is_hollow:
            initialize_rows(
                self.rows,
                embedding.weight[:base_size],
                head.weight[:base_size],
                vocabulary.segments,
                initialization,
            )
        self.teacher = teacher.requires_grad_(False).eval() if teacher is not None else None
        self.base_size = base_size
        self._segments = vocabulary.segments
        self.num_active = len(vocabulary)
        self.folding = Folding(vocabulary.segments, base_size)
        # Base tokens that a latent stands for, by latent; the last entry (index -1) is for all
        # base tokens.
        lengths = torch.tensor([*map(len, vocabulary.segments), 1])
        self.register_buffer("unit_lengths", lengths, persistent=False)
        self.adapters: Any = None
        if trainable == "lora":
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", lora_dropout=0.0
            )
            # This changes `model` in place; the adapters are in fp32.
            self.adapters = get_peft_model(model, config)
        self._adapted = adapted_layers(model) if trainable == "lora" else []
        model.set_input_embeddings(ExtendedEmbedding(embedding, self.rows, base_size))
        self.model = model
        self.model.eval()
        self._scales: tuple[float, float] | None = None

    def train(self, mode: bool = True) -> "Student":
        """Stay in evaluation mode: dropout would make teacher and student differ for no reason."""
        return super().train(False)

    @property
    def heads(self) -> Heads:
        """Output matrices of base tokens, the teacher's and the student's, and of latents."""
        base, teacher = (
            _head_of(model).weight[: self.base_size]
            for model in (self.model, self.teacher or self.model)
        )
        latent = self.rows.output_rows
        if self.num_active < len(self._segments):
            latent = latent[: self.num_active]
        return Heads(teacher=teacher, base=base, latent=latent)

    def activate(self, num_latents: int) -> None:
        """Leave the first latents in play.

        The rows of the others stay as they are: nothing reads them or gives them probability.
        """
        assert 0 <= num_latents <= len(self._segments), "there are no more latents"
        device = self.folding.group_of_token.device
        self.num_active = num_latents
        self.folding = Folding(self._segments[:num_latents], self.base_size).to(device)

    def student_hidden(
        self, ids: Int[Tensor, "B S"], mask: Int[Tensor, "B S"], *, is_grounding: bool = False
    ) -> Float[Tensor, "B S D"]:
        """Read units; in grounding with new rows alone."""
        if is_grounding:
            with self._without_adapters():
                return self._read(self.model, ids, mask, first_trained=self.base_size)
        # Nothing but rows is trained where there is nothing beside them.
        first_trained = self.base_size if self.adapters is self.teacher is None else None
        with self._mixed_precision(ids.device):
            return self._read(self.model, ids, mask, first_trained=first_trained)

    @torch.no_grad()
    def student_hidden_after(
        self,
        ids: Int[Tensor, "B S"],
        mask: Int[Tensor, "B S0"],
        positions: Int[Tensor, "B S"],
        cache: Any,
    ) -> tuple[Float[Tensor, "B D"], Any]:
        """Read on from keys and values of what was read before; None where that is nothing.

        Returns:
            The hidden states of the last position, and the keys and values of all.
        """
        backbone = getattr(self.model, self.model.base_model_prefix)
        with self._mixed_precision(ids.device):
            output = backbone(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        return output.last_hidden_state[:, -1], output.past_key_values

    @contextmanager
    def _mixed_precision(self, device: torch.device) -> Iterator[None]:
        """Compute in the frozen weights' precision: what is trained is in fp32."""
        dtype = _head_of(self.teacher or self.model).weight.dtype
        is_mixed = dtype == torch.bfloat16 and (self.adapters or self.teacher) is not None
        # The cache would keep a copy of each layer's weights beyond the layer.
        is_cached = not self.is_sharded
        with (
            torch.autocast(
                device.type, dtype=torch.bfloat16, enabled=is_mixed, cache_enabled=is_cached
            ),
            # An adapter's input would be widened to its weights first, and narrowed again at once.
            self._with_adapters(CASTS_INPUT, not is_mixed),
        ):
            yield

    @torch.no_grad()
    def teacher_hidden(
        self, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T D"]:
        """Read base tokens as the frozen base model does."""
        if self.teacher is not None:
            return self._read(self.teacher, ids, mask)
        with self._without_adapters():
            return self._read(self.model, ids, mask)

    def _read(
        self, model: "PreTrainedModel", ids: Tensor, mask: Tensor, first_trained: int | None = None
    ) -> Tensor:
        return read(model, ids, mask, first_trained=first_trained, is_whole=self.is_sharded)

    def check_head(self) -> None:
        """Refuse a model that was hollow when it was taken over; see `check_plain_head`."""
        check_plain_head(self.model)

    def _without_adapters(self) -> AbstractContextManager[Any]:
        return self._with_adapters(DISABLED, True)

    def _with_adapters(self, name: str, value: bool) -> AbstractContextManager[None]:
        return switched([(module, name, value) for module in self._adapted])

    def scaled_rows(self) -> tuple[tuple[nn.Parameter, float], ...]:
        """Return both matrices of rows with the root mean square of the base matrix beside each."""
        inputs, outputs = self._scales or self._base_scales()
        return (self.rows.input_rows, inputs), (self.rows.output_rows, outputs)

    def remember_scales(self) -> None:
        """Keep these roots from a time when the base matrices can be read."""
        self._scales = self._base_scales()

    def _base_scales(self) -> tuple[float, float]:
        embedding: Any = self.model.get_input_embeddings()
        return (
            root_mean_square(embedding.weight[: self.base_size]),
            root_mean_square(_head_of(self.model).weight[: self.base_size]),
        )

    @property
    def other_parameters(self) -> list[nn.Parameter]:
        """What is trained beside the new rows: adapters, or the base model."""
        rows = {id(parameter) for parameter in self.rows.parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in rows]

    @property
    def stop_units(self) -> set[int]:
        """Tokens that end a turn, as the base model's generation settings name them."""
        generation: Any = self.model.generation_config
        stop = generation.eos_token_id
        return set(stop if isinstance(stop, list) else [] if stop is None else [stop])

    @property
    def max_length(self) -> float:
        """Most units that the model reads; infinite where its configuration names no limit."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or float("inf")

    def trained_state(self) -> dict[str, Tensor]:
        """Return what training changes: rows, and adapters where there are any.

        Of a sharded student this process's share.
        """
        if self.is_sharded:
            self.reshard()  # type: ignore[operator]  # after validation the root is still whole
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def release(self) -> "PreTrainedModel":
        """Return the plain model with adapters merged and its own embedding back in place.

        The student ends here.
        """
        wrapped = self.model.get_input_embeddings()
        assert isinstance(wrapped, ExtendedEmbedding)
        self.model.set_input_embeddings(wrapped.base)
        return self.adapters.merge_and_unload() if self.adapters is not None else self.model


def load_student(
    checkpoint: Path,
    vocabulary: LatentVocabulary,
    *,
    trainable: Trainable = "rows",
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Student:
    """Load a base checkpoint and extend it; `options` go to `Student`.

    Weights are frozen in `dtype`, and trained in fp32.
    """
    from transformers import AutoModelForCausalLM

    def load(dtype: torch.dtype) -> Any:
        # Loaded in its precision rather than cast: a cast would round the rotary frequencies too.
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)

    if trainable == "full":
        options["teacher"] = load(dtype)
        dtype = torch.float32
    return Student(load(dtype), vocabulary, trainable=trainable, **options)


def _head_of(model: "PreTrainedModel") -> Any:
    return model.get_output_embeddings()


@torch.no_grad()
def check_plain_head(model: "PreTrainedModel") -> None:
    """Refuse architectures that change logits after the output matrix (caps, scales).

    The loss projects itself. Logits are made large for the check: a cap leaves small ones alone.
    """
    ids = torch.arange(1, 5, device=model.device)[None]
    seen: list[Tensor] = []

    def enlarge(_: nn.Module, __: Any, logits: Tensor) -> Tensor:
        seen.append(1e3 * logits)
        return seen[-1]

    handle = _head_of(model).register_forward_hook(enlarge)
    try:
        found = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    if not torch.allclose(seen[-1].float(), found.float(), atol=1e-2, rtol=1e-2):
        raise SettingError(
            "`base_model` must take its logits straight from its output matrix, got "
            f"{type(model).__name__}, which "
            "changes them afterwards. Choose another architecture."
        )
