"""Devices and what joins them, by the figures of their makers.

Sources, figures without sparsity: NVIDIA H200 data sheet (SXM: 141 GB of HBM3e, 4.8 TB/s, 989
TFLOP/s in bf16, NVLink 900 GB/s, both directions together); NVIDIA DGX H200 data sheet (eight
devices a node, one ConnectX-7 of 400 Gb/s for each).
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A kind of device in nodes of several."""

    name: str
    memory_bytes: float
    flops: float
    """Of matrix products in bf16, a second."""
    memory_bandwidth: float
    """Bytes a second."""
    node_bandwidth: float
    """Bytes a second between the devices of a node, in one direction."""
    network_bandwidth: float
    """Bytes a second and device between nodes, in one direction."""
    devices_per_node: int = 8
    usable_share: float = 0.92
    """Of memory: the rest is CUDA's context, NCCL's buffers, and what the allocator wastes. An
    assumption."""


H200 = Machine(
    name="H200",
    memory_bytes=141e9,
    flops=989e12,
    memory_bandwidth=4.8e12,
    node_bandwidth=450e9,
    network_bandwidth=50e9,
)
