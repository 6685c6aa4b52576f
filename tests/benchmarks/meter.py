"""What a step costs (seconds, memory, operations), reported by a process that steps on demand."""

import json
import os
import sys
import time
from ctypes import CDLL
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

for suffix in ("", "_backward"):  # torch counts attention on accelerators only
    attention = "_scaled_dot_product_flash_attention"
    counted = getattr(torch.ops.aten, attention + suffix)
    flop_registry[getattr(torch.ops.aten, f"{attention}_for_cpu{suffix}")] = flop_registry[counted]


class FlopCounter(TorchDispatchMode):
    """Counts the operations of matrix products and attention, as torch's own counter does.

    That one watches modules too, and stops at a loss that differentiates inside its forward.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.total = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class Meter:
    """Waits for a line on standard input before each step and reports on the step behind it.

    Memory is that of the process, or what PyTorch's allocator has handed out on a card.
    """

    def __init__(self, reports: Any, num_batches: int, device: str = "cpu") -> None:
        """Write reports to `reports`: trainers print what they like."""
        self.reports = reports
        self.num_batches = num_batches
        self.num_steps = 0
        self.device = device
        self.estimated: dict[str, float] = {}
        """What was expected of a step, where it was."""

    def begin(self) -> None:
        """Wait, then start to measure."""
        if not sys.stdin.readline():
            sys.exit()
        if self.device == "cpu":
            CDLL("libc.so.6").malloc_trim(0)  # what earlier steps freed is not this step's
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _memory("VmRSS")
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        # Counting slows a step: only the first round, which warms up, is counted.
        self.counter = FlopCounter() if self.num_steps < self.num_batches else None
        if self.counter:
            self.counter.__enter__()
        self.start = time.perf_counter(), time.process_time()

    def end(self, loss: float | None) -> None:
        """Report on the step."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        ends = time.perf_counter(), time.process_time()
        seconds, cpu_seconds = (end - start for end, start in zip(ends, self.start, strict=True))
        if self.counter:
            self.counter.__exit__(None, None, None)
        report = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "before": self.before,
            "flops": self.counter and self.counter.total,
            "loss": loss,
            "estimated": self.estimated,
            **self._peaks(),
        }
        self.num_steps += 1
        print(json.dumps(report), file=self.reports, flush=True)

    def _peaks(self) -> dict[str, int]:
        """Return the most bytes in use during the step, and on a card those set aside for it."""
        if self.device == "cpu":
            return {"peak": _memory("VmHWM")}
        free, total = torch.cuda.mem_get_info()
        return {
            "peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "taken": total - free,  # by the allocator, CUDA and its libraries
        }


def _memory(name: str) -> int:
    """Return a figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def reports_alone() -> Any:
    """Return standard output for reports; what trainers print goes to standard error."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return reports
