"""What several processes of one run agree on."""

from typing import Any

import torch


def is_any(flag: bool, device: torch.device) -> bool:
    """Tell whether a flag is set in any process; all must ask together."""
    if not _are_several():
        return flag
    found = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def first_fault(fault: str | None, device: torch.device) -> str | None:
    """Return what is wrong in the first process where something is; all must ask together."""
    if not is_any(fault is not None, device) or not _are_several():
        return fault
    faults: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(faults, fault)
    return next(f"{found} (process {rank})" for rank, found in enumerate(faults) if found)


def _are_several() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def share_progress(fit_loop: dict[str, Any], num_before: int, num_now: int) -> None:
    """Count batches as each of `num_now` processes has had them, in the state of Lightning's loop.

    The position in the data is restored by the loader itself, see `TrajectoryLoader`.
    """
    if num_before == num_now:
        return
    progress = fit_loop["epoch_loop.batch_progress"]
    for counters in (progress["total"], progress["current"]):
        for name, count in counters.items():
            counters[name] = -(-count * num_before // num_now)
