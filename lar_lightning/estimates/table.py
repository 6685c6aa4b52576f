"""The table of the verb `estimate`: what fits where, how fast it would be, and ways out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lar_lightning.errors import SettingError
from lar_lightning.estimates.backbones import Backbone, backbone_of
from lar_lightning.estimates.machines import H200, Machine
from lar_lightning.estimates.memory import MemoryEstimate, memory_of
from lar_lightning.estimates.speed import SpeedEstimate, speed_of
from lar_lightning.estimates.workload import Trainable, Workload

HEADER = (
    "backbone",
    "trains",
    "devices",
    "weights",
    "teacher",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "gathered",
    "peak GB",
    "fits",
    "s/step",
    "tokens/s",
    "bound by",
    "way out",
)


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Shares of what the hardware could do at best that a step is taken to reach.

    One H200 reached 0.33 to 0.55 of its products with a model of 8B (README); bandwidths have not
    been measured.
    """

    utilisation: float = 0.4
    """Of the speed of matrix products."""
    bandwidth_share: float = 0.7
    """Of the bandwidth between devices."""

    def __post_init__(self) -> None:
        for name in ("utilisation", "bandwidth_share"):
            if not 0 < getattr(self, name) <= 1:
                raise SettingError(
                    f"`assumptions.{name}` must lie above 0 and at most at 1, got "
                    f"{getattr(self, name)}."
                )


def table_lines(
    backbones: Sequence[str],
    trainables: Sequence[Trainable],
    devices: Sequence[int],
    work: Workload,
    assumptions: Assumptions = Assumptions(),
    machine: Machine = H200,
) -> list[str]:
    """Return the table in Markdown, and what it rests on."""
    cells = [HEADER, tuple("---" for _ in HEADER)]
    for name in backbones:
        backbone = backbone_of(name)
        for trainable in trainables:
            for count in devices:
                chosen = replace(work, trainable=trainable, num_shards=count)
                cells.append(_row(backbone, chosen, machine, assumptions))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return [_basis(work, machine, assumptions), "", *lines]


def fits(memory: MemoryEstimate, machine: Machine) -> bool:
    """Tell whether a step stays within a device."""
    return memory.peak <= machine.memory_bytes * machine.usable_share


def ways_out(backbone: Backbone, work: Workload, machine: Machine) -> Iterator[str]:
    """Yield what would make a step fit, what costs least first."""
    more = [count for count in (8, 16, 32, 64, 128) if count > work.num_shards]
    choices = [
        ("is_checkpointed", {"is_checkpointed": True}),
        *((f"rows_per_chunk {rows}", {"rows_per_chunk": rows}) for rows in (256, 64)),
        *(
            (f"shard over {count}{also}", {"num_shards": count, **change})
            for also, change in (("", {}), (" and is_checkpointed", {"is_checkpointed": True}))
            for count in more
        ),
        *((f"train {name}", {"trainable": name}) for name in ("lora", "rows")),
    ]
    for name, change in choices:
        changed = replace(work, **change)
        if changed != work and fits(memory := memory_of(backbone, changed), machine):
            yield f"{name} ({memory.peak / 1e9:.0f} GB)"


def _row(
    backbone: Backbone, work: Workload, machine: Machine, assumptions: Assumptions
) -> tuple[str, ...]:
    memory = memory_of(backbone, work)
    speed = speed_of(
        backbone,
        work,
        machine,
        num_devices=work.num_shards,
        utilisation=assumptions.utilisation,
        bandwidth_share=assumptions.bandwidth_share,
    )
    is_fitting = fits(memory, machine)
    way_out = "" if is_fitting else next(ways_out(backbone, work, machine), "more, shorter batches")
    parts = (
        memory.weights,
        memory.teacher,
        memory.gradients,
        memory.optimizer,
        memory.activations,
        memory.logits,
        memory.gathered,
        memory.peak,
    )
    times = (f"{speed.seconds:.2f}", f"{speed.tokens_per_second:,.0f}", _bound(speed))
    return (
        backbone.name,
        work.trainable,
        str(work.num_shards),
        *(f"{part / 1e9:.1f}" for part in parts),
        "yes" if is_fitting else "no",
        *(times if is_fitting else ("", "", "")),
        way_out,
    )


def _bound(speed: SpeedEstimate) -> str:
    return "products" if speed.compute_seconds >= speed.transfer_seconds else "transfers"


def _basis(work: Workload, machine: Machine, assumptions: Assumptions) -> str:
    limit = machine.memory_bytes * machine.usable_share / 1e9
    return (
        f"{machine.name}, GB (1e9 bytes) of each device, of which {limit:.0f} can be used; "
        f"{work.batch_size} x {work.num_tokens:,} tokens a device "
        f"({work.num_prompt_tokens:,} of prompt), {work.num_units:,} units, "
        f"{work.num_rows:,} rows in chunks of {work.rows_per_chunk:,}; activation checkpointing "
        f"{'on' if work.is_checkpointed else 'off'}; sharded over all devices (FSDP2). Speed: "
        f"assumed, at {assumptions.utilisation:.0%} of {machine.flops / 1e12:,.0f} TFLOP/s and "
        f"{assumptions.bandwidth_share:.0%} of bandwidth."
    )
