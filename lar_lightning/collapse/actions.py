"""What can be done about a collapse, in all processes alike.

Said, weights put back, the learning rate lowered.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lar_lightning.collapse.monitor import Alarm
from lar_lightning.tracking.tracked_run import alert

if TYPE_CHECKING:
    import lightning as L


def agreed(
    trainer: "L.Trainer", names: Sequence[str], values: Mapping[str, float]
) -> dict[str, float]:
    """Return means over the processes that have a value, the same in all of them."""
    device = trainer.lightning_module.device
    table = torch.tensor(
        [[values.get(name, 0.0), float(name in values)] for name in names],
        device=device,
        dtype=torch.float32 if device.type == "mps" else torch.float64,
    ).reshape(-1, 2)
    sums: Any = trainer.strategy.reduce(table, reduce_op="sum")
    return {
        name: total / count
        for name, (total, count) in zip(names, sums.tolist(), strict=True)
        if count
    }


def say(trainer: "L.Trainer", text: str) -> None:
    """Print a line, once for all processes."""
    if trainer.is_global_zero:
        print(f"collapse: {text}", flush=True)


def announce(trainer: "L.Trainer", alarms: Sequence[Alarm], num_alarms: int, done: str) -> None:
    """Say alarms on the terminal, in `run_dir/metrics/collapse.jsonl`, and to loggers."""
    if not trainer.is_global_zero:
        return
    lines = [f"{alarm}: {done}" for alarm in alarms]
    for line in lines:
        say(trainer, line)
    path = Path(trainer.default_root_dir) / "metrics" / "collapse.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**vars(alarm), "done": done}) + "\n" for alarm in alarms)
    for logger in trainer.loggers:
        logger.log_metrics({"collapse/alarm": float(num_alarms)}, trainer.global_step)
    alert(trainer.loggers, "collapse", "\n".join(lines))


def restore_weights(trainer: "L.Trainer", path: Path) -> None:
    """Put a checkpoint's trained weights into the model, in all processes; optimizers start anew.

    Schedules of the learning rate, data position and steps stay where they are.
    """
    module: Any = trainer.lightning_module
    if getattr(module.student, "is_sharded", False):
        module.student.reshard()
    with torch.inference_mode(False):
        content = trainer.strategy.load_checkpoint(path, weights_only=True)
        trainer.strategy.load_model_state_dict(content, strict=False)
    reset_optimizers(trainer)


def reset_optimizers(trainer: "L.Trainer") -> None:
    """Forget moments, and gradients that are being accumulated."""
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
        optimizer.zero_grad()


def scale_learning_rate(trainer: "L.Trainer", factor: float) -> None:
    """Multiply the learning rate of this step and of all that follow."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= factor
    for config in trainer.lr_scheduler_configs:
        schedule: Any = config.scheduler
        schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]  # goes into checkpoints
