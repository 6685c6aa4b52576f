"""Operations, bytes and seconds of a step.

    seconds = max(operations / (machine's speed x utilisation),
                  bytes between devices / (bandwidth x share reached))
              + optimizer's bytes / memory bandwidth

Operations are those of matrix products and attention, counted as PyTorch's `FlopCounterMode` counts
them: a product of (m, k) and (k, n) is 2 m k n, attention's squares count in full although causal
kernels skip half of them. Transfers of sharded weights run beside the computation, so the slower of
both counts. Both shares of what is possible are assumptions that `estimate` takes as options; on a
machine at hand, `make bench-estimates` measures the first.
"""

from dataclasses import dataclass

from lar_lightning.estimates.backbones import Backbone
from lar_lightning.estimates.machines import Machine
from lar_lightning.estimates.memory import trained_parameters
from lar_lightning.estimates.workload import Workload

BACKWARD_OF_ATTENTION = 2.5
"""Products in the backward pass for one in the forward pass: scores are computed again."""


@dataclass(frozen=True, kw_only=True)
class SpeedEstimate:
    """A step of all devices together."""

    flops: float
    """Of one device."""
    compute_seconds: float
    transfer_seconds: float
    optimizer_seconds: float
    tokens: int
    """Expanded tokens that all devices read."""

    @property
    def seconds(self) -> float:
        """Of a step."""
        return max(self.compute_seconds, self.transfer_seconds) + self.optimizer_seconds

    @property
    def tokens_per_second(self) -> float:
        """Expanded tokens a second, of all devices."""
        return self.tokens / self.seconds


def speed_of(
    backbone: Backbone,
    work: Workload,
    machine: Machine,
    *,
    num_devices: int = 1,
    utilisation: float = 0.4,
    bandwidth_share: float = 0.7,
) -> SpeedEstimate:
    """Estimate the time of a step."""
    flops = flops_of(backbone, work)
    trained = trained_parameters(backbone, work)
    return SpeedEstimate(
        flops=flops,
        compute_seconds=flops / (machine.flops * utilisation),
        transfer_seconds=_transfer_seconds(backbone, work, machine, num_devices) / bandwidth_share,
        # Weight, gradient and two states are read, three of them written.
        optimizer_seconds=7 * 4 * trained / work.num_shards / machine.memory_bandwidth,
        tokens=num_devices * work.batch_size * work.num_tokens,
    )


def flops_of(backbone: Backbone, work: Workload) -> float:
    """Return the operations of a step on one device."""
    teacher = forward_flops(backbone, work, work.num_tokens)
    student = forward_flops(backbone, work, work.num_units)
    learning = work.num_learning / work.num_units
    linear, attention = _linear(backbone, work.num_units), _attention(backbone, work.num_units)
    # Gradients of inputs everywhere; of weights where those are trained.
    per_linear = 2 if work.trainable == "full" else 1
    backward = (
        learning
        * work.batch_size
        * backbone.num_layers
        * (per_linear * linear + BACKWARD_OF_ATTENTION * attention)
    )
    adapters = 0
    if work.trainable == "lora":
        read = 2 * backbone.adapter_parameters(work.lora_rank) * work.batch_size * work.num_units
        adapters = read * (4 if work.is_checkpointed else 3)
    again = student if work.is_checkpointed else 0
    return teacher + student + backward + again + adapters + head_flops(backbone, work)


def forward_flops(backbone: Backbone, work: Workload, length: int) -> float:
    """Return the operations of reading sequences of so many positions; without the output."""
    layer = _linear(backbone, length) + _attention(backbone, length)
    if length == work.num_units and work.num_constant:
        # The constant part is read by itself: nothing of it attends to what comes behind.
        constant = _attention(backbone, 1) * work.num_constant
        layer -= constant * (work.num_units - work.num_constant)
    return work.batch_size * backbone.num_layers * layer


def head_flops(backbone: Backbone, work: Workload) -> float:
    """Return the operations of the loss: logits of both models, and their gradients."""
    base = 2 * work.num_rows * backbone.matrix_parameters
    latent = 2 * work.num_rows * work.num_latents * backbone.hidden_size
    return base * (4 if work.trainable == "full" else 3) + latent * 3


def _linear(backbone: Backbone, length: int) -> float:
    return 2 * length * backbone.linear_parameters


def _attention(backbone: Backbone, length: int) -> float:
    return 4 * backbone.query_size * length**2


def _transfer_seconds(
    backbone: Backbone, work: Workload, machine: Machine, num_devices: int
) -> float:
    """Return the time that transfers take at full bandwidth.

    Weights in bf16 are gathered for the teacher, the student and its backward pass; gradients in
    fp32 come together once. A node's devices fetch from other nodes in equal shares, each through
    its own link. Devices beside the shards only add gradients up.
    """
    num_passes = 4 if work.is_checkpointed and work.trainable == "full" else 3
    weights = num_passes * 2 * backbone.num_parameters if work.num_shards > 1 else 0
    gradients = 4 * trained_parameters(backbone, work) * (1 if work.num_shards > 1 else 2)
    if num_devices == 1:
        return 0.0
    num_nodes = max(num_devices // machine.devices_per_node, 1)
    within = min(num_devices, machine.devices_per_node)
    inner = (weights + gradients) * (within - 1) / within / machine.node_bandwidth
    is_across = work.num_shards > machine.devices_per_node
    across = (weights if is_across else 0) + (gradients if num_nodes > 1 else 0)
    across /= 1 if is_across else work.num_shards
    rails = within * machine.network_bandwidth
    return max(inner, across * (num_nodes - 1) / num_nodes / rails)
