"""Bytes on a device at the three moments of a step that can be its peak.

    fixed      weights (bf16; trained ones in fp32), the teacher's copy for `full`, AdamW's states
    forward    fixed + gradients of the step before (Lightning drops them after the loss) + what the
               student keeps for its backward pass + the loss's chunk of logits
    backward   fixed + what the student keeps + gradients that have come up + one layer at work
    optimizer  fixed + gradients + AdamW's temporary of all trained weights (`foreach`)

Cut over n devices (FSDP2), weights, gradients and states are a share of n; the two layers at work
and both vocabulary matrices are there whole, in bf16. What is kept for the backward pass is counted
tensor by tensor as Transformers' Llama layers keep it, with PyTorch's attention kernels, which keep
no scores. Not counted: the CUDA context, NCCL's buffers and what the allocator wastes; see
`machines.Machine.usable_share`.
"""

from dataclasses import dataclass

from lar_lightning.estimates.backbones import Backbone
from lar_lightning.estimates.workload import Workload

LOGIT_COPIES = 9
"""Tensors of (rows of a chunk x vocabulary) in fp32 that the loss holds at once, as measured."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one device; the peak is the largest of the three moments."""

    weights: float
    """Of the student, trained or not; without a copy of its own the teacher reads the same."""
    teacher: float
    """Its copy, for `full`."""
    gradients: float
    optimizer: float
    """AdamW's two states."""
    activations: float
    """What the student keeps for its backward pass, and hidden states of both models."""
    logits: float
    """The loss's chunk, its gradients, and copies of the output matrix where that is trained."""
    gathered: float
    """Layers and matrices gathered from other devices, or bf16 copies of trained weights."""
    layer: float
    """At work in the backward pass; with checkpointing, also computed again."""
    temporary: float
    """Of the optimizer."""

    @property
    def fixed(self) -> float:
        """There all the time."""
        return self.weights + self.teacher + self.optimizer

    @property
    def moments(self) -> dict[str, float]:
        """Bytes at each moment."""
        kept = self.fixed + self.activations + self.gathered
        return {
            "forward": kept + self.gradients + self.logits,
            "backward": kept + self.layer,
            "optimizer": self.fixed + self.gradients + self.temporary,
        }

    @property
    def peak(self) -> float:
        """Bytes at the peak of a step."""
        return max(self.moments.values())


def memory_of(backbone: Backbone, work: Workload) -> MemoryEstimate:
    """Estimate the memory of a device."""
    is_full, shards = work.trainable == "full", work.num_shards
    trained = trained_parameters(backbone, work)
    base = 2 * backbone.num_parameters
    matrices = backbone.matrix_parameters
    extra = 4 * matrices if is_full else 0
    chunk = 4 * min(work.rows_per_chunk, work.num_rows) * backbone.vocabulary_size
    kept = 0 if work.is_checkpointed else backbone.num_layers * layer_bytes(backbone, work)
    return MemoryEstimate(
        weights=(2 * base if is_full else base + 4 * trained) / shards
        + _rows_if_full(backbone, work),
        teacher=base / shards if is_full else 0,
        gradients=4 * trained / shards,
        optimizer=8 * trained / shards,
        activations=kept + _inputs_of_layers(backbone, work) + _hidden_bytes(backbone, work),
        # With a trained output matrix: its gradient in fp32, its copy in bf16, and while a chunk is
        # added to the gradient what is added, in bf16 and (on a CPU) in fp32.
        logits=max(LOGIT_COPIES * chunk, 4 * chunk + 1.5 * extra) + 1.5 * extra,
        gathered=_gathered_bytes(backbone, work),
        layer=_working_bytes(backbone, work) + 2 * extra,
        temporary=4 * trained / shards,
    )


def trained_parameters(backbone: Backbone, work: Workload) -> int:
    """Return how many parameters are trained."""
    rows = 2 * work.num_latents * backbone.hidden_size
    beside = {
        "rows": 0,
        "lora": backbone.adapter_parameters(work.lora_rank),
        "full": backbone.num_parameters,
    }
    return rows + beside[work.trainable]


def _rows_if_full(backbone: Backbone, work: Workload) -> float:
    rows = 8 * work.num_latents * backbone.hidden_size
    return rows / work.num_shards if work.trainable == "full" else 0


def layer_bytes(backbone: Backbone, work: Workload) -> float:
    """Return what a layer keeps for its backward pass."""
    hidden, wide, query, key = (
        backbone.hidden_size,
        backbone.feed_forward_size,
        backbone.query_size,
        backbone.key_size,
    )
    norms = 2 * 4 * hidden  # inputs in fp32
    attention = 2 * 2 * query + 4 * backbone.num_heads  # queries, result; scale of each head
    feed_forward = 3 * 2 * wide  # gate, its activation, up
    if backbone.has_head_norms:
        norms += 4 * (query + key)
    if work.trainable != "rows":
        feed_forward += 2 * wide  # input of the down projection
    if work.trainable == "lora":
        norms += 2 * 2 * hidden  # inputs of the other projections
        attention += 2 * work.lora_rank * len(backbone.linear_shapes)
    if work.trainable == "full":
        # Norms keep what they scale, and each of five projections its input in bf16.
        norms += 2 * 4 * hidden + 5 * 2 * hidden
        if backbone.has_head_norms:
            norms += 2 * (query + key)
    # Under a mask keys and values are kept for each head of the queries.
    both = 2 * 2 * (query if work.has_mask else key)
    positions, units = work.batch_size * work.num_learning, work.batch_size * work.num_units
    mask = 2 * positions * work.num_units if work.has_mask else 0
    return positions * (norms + attention + feed_forward) + units * both + mask


def _element(work: Workload) -> int:
    """Return the bytes of an entry of the student's hidden states."""
    return 4 if work.trainable == "full" else 2


def _inputs_of_layers(backbone: Backbone, work: Workload) -> float:
    """Return what is kept between layers: with checkpointing, and at the last norm."""
    element, hidden = _element(work), backbone.hidden_size
    positions = work.batch_size * work.num_learning
    between = backbone.num_layers * element * hidden if work.is_checkpointed else 0
    last = 4 * hidden * (2 if work.trainable == "full" else 1)
    return positions * (between + last)


def _hidden_bytes(backbone: Backbone, work: Workload) -> float:
    """Return both models' last hidden states, whole and at the rows, and their gradient."""
    element, hidden = _element(work), backbone.hidden_size
    whole = work.batch_size * (2 * work.num_tokens + element * work.num_units)
    return hidden * (whole + work.num_rows * (2 + element + 4))


def _gathered_bytes(backbone: Backbone, work: Workload) -> float:
    is_full = work.trainable == "full"
    if work.num_shards > 1:
        roots = (2 if is_full else 1) * (1 if backbone.is_tied else 2)
        gradients = 2 * 4 * backbone.layer_parameters if is_full else 0
        return (
            2 * 2 * backbone.layer_parameters + roots * 2 * backbone.matrix_parameters + gradients
        )
    # Autocast keeps the copies that it has made of trained weights.
    if is_full:
        return 2 * backbone.num_layers * backbone.linear_parameters
    return 2 * backbone.adapter_parameters(work.lora_rank) if work.trainable == "lora" else 0


def _working_bytes(backbone: Backbone, work: Workload) -> float:
    """Return gradients within a layer, and the layer itself where it is computed again."""
    positions = work.batch_size * work.num_learning
    gradients = 3 * 2 * backbone.feed_forward_size + 3 * 4 * backbone.hidden_size
    again = layer_bytes(backbone, work) if work.is_checkpointed else 0
    return positions * gradients + again
