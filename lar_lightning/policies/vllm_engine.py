"""The vLLM engine; the only file that imports vLLM, and only when it is opened."""

import gc
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lar_lightning.errors import EngineFailure
from lar_lightning.policies.policy import Completion, Request, Sampling, entropy_upper_bound
from lar_lightning.settings import ParallelSettings

if TYPE_CHECKING:
    from torch import Tensor

DEAD_EXECUTOR = ("Executor failed.", "cancelled")
"""What vLLM says where a worker that shares the model is gone, later or in the same step."""
NUM_LOG_PROBABILITIES = 20
"""vLLM's own limit without a setting; more costs time a token."""


class VllmPolicy:
    """A loaded vLLM engine in this process."""

    entropy_kind = f"upper bound from top-{NUM_LOG_PROBABILITIES}"

    def __init__(self, llm: Any) -> None:
        """Wrap a `vllm.LLM`."""
        self.llm = llm
        self.vocabulary_size = llm.llm_engine.model_config.get_vocab_size()
        self.unfinished: dict[str, Sampling] = {}

    def submit(self, request: Request, sampling: Sampling) -> None:
        """Hand a request to the engine."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=request.temperature,
            max_tokens=sampling.max_tokens,
            seed=request.seed if request.temperature > 0 else None,
            logprobs=NUM_LOG_PROBABILITIES if sampling.with_entropies else None,
            detokenize=bool(sampling.stops),
            stop=list(sampling.stops) or None,
            include_stop_str_in_output=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        with _explained_death():
            self.llm.llm_engine.add_request(
                request.request_id,
                TokensPrompt(prompt_token_ids=list(request.prompt_ids)),
                parameters,
            )
        self.unfinished[request.request_id] = sampling

    def step(self) -> list[Completion]:
        """Decode one unit of each request that runs."""
        if not self.unfinished:
            return []
        with _explained_death():
            outputs = self.llm.llm_engine.step()
        return [
            self._completion(output, self.unfinished.pop(output.request_id))
            for output in outputs
            if output.finished
        ]

    def abort(self) -> None:
        """Take all requests out of the engine."""
        # A dead engine has forgotten them; the caller is told of its death elsewhere.
        with suppress(EngineFailure), _explained_death():
            self.llm.llm_engine.abort_request(list(self.unfinished))
        self.unfinished.clear()

    def load_weights(self, weights: "Iterable[tuple[str, Tensor]]") -> None:
        """Put other weights in the place of those of the same names in the checkpoint.

        Layers none of whose tensors are named keep theirs; a fused one (queries, keys and values;
        gate and up) needs all of its parts. For an engine opened with `is_beside_training`.
        """
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def _completion(self, output: Any, sampling: Sampling) -> Completion:
        written = output.outputs[0]
        entropies = None
        if sampling.with_entropies:
            entropies = np.asarray(
                [
                    entropy_upper_bound(_largest(position), self.vocabulary_size)
                    for position in written.logprobs
                ],
                dtype=np.float32,
            )
        return Completion(
            request_id=output.request_id,
            token_ids=list(written.token_ids),
            is_finished=written.finish_reason == "stop",
            entropies=entropies,
        )


@contextmanager
def _explained_death() -> Iterator[None]:
    """Say in one line that an engine, or a worker that shares its model, is gone."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except (EngineDeadError, RuntimeError) as error:
        is_death = isinstance(error, EngineDeadError) or str(error) in DEAD_EXECUTOR
        if not is_death:
            raise
        raise EngineFailure(
            f"vLLM's engine must live through the run, but a process of it died ({error}); memory "
            "that ran out is the usual reason. What was finished is kept: the same command goes on "
            "from there, with a smaller `num_concurrent` or `max_model_len` if it dies again."
        ) from error


def _largest(position: Any) -> np.ndarray:
    # The sampled token is listed too, also where it is not among the largest; any listed token
    # tightens the bound.
    return np.asarray([entry.logprob for entry in position.values()], dtype=np.float64)


@contextmanager
def hidden_module(name: str) -> Iterator[None]:
    """Take a module out of sight while vLLM 0.32 looks through all of them.

    It reads `vars` of every object that it finds; llvmlite's library object (numba loads it, and
    mining loads numba) answers that with something else, on which the engine's start fails.
    """
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module


def _cores_apart(num_workers: int) -> str:
    """Return as many disjoint lists of cores, as vLLM names them; no binding for too few cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    size = len(cores) // num_workers
    if not size:
        return "nobind"
    parts = (cores[number * size : (number + 1) * size] for number in range(num_workers))
    return "|".join(",".join(map(str, part)) for part in parts)


@contextmanager
def _explained_start(checkpoint: Path) -> Iterator[None]:
    """Say in one line why vLLM does not start; what it wrote before has the details."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        words = " ".join(str(error).split())[:400]
        raise EngineFailure(
            f"vLLM must be able to open {checkpoint}, got {type(error).__name__}: {words}. If "
            "memory is short, lower `num_concurrent` or `max_model_len` or raise "
            "`tensor_parallel_size`; `engine: transformers` runs without vLLM."
        ) from error


@contextmanager
def open_vllm(
    checkpoint: Path,
    *,
    num_concurrent: int,
    max_model_len: int,
    seed: int,
    is_beside_training: bool = False,
    parallel: ParallelSettings = ParallelSettings(),
) -> Iterator[VllmPolicy]:
    """Load a checkpoint into vLLM and free it afterwards.

    Args:
        checkpoint: An ordinary Hugging Face folder.
        num_concurrent: Episodes that decode together.
        max_model_len: Longest prompt with its completion, in units.
        seed: Of the engine; requests bring their own.
        is_beside_training: A trainer shares the device and changes the weights: the engine runs in
            this process, needs no tokenizer, and keeps nothing that older weights have computed.
        parallel: Its tensor parallelism; copies of the engine are processes of their own.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    import torch

    options: dict[str, Any] = {}
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        # In process: it loads in a third of the time. vLLM's CPU sampler cannot rewind a seeded
        # generator, which it does where a prompt is prefilled in pieces; so prompts are prefilled
        # whole.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        options = {"enforce_eager": True, "enable_chunked_prefill": False}
        options["max_num_batched_tokens"] = max(4096, max_model_len)
    if is_beside_training:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        options |= {"skip_tokenizer_init": True, "enable_prefix_caching": False}
        if torch.cuda.is_available():
            options["gpu_memory_utilization"] = 0.3  # of the card; the rest is the trainer's
    if parallel.tensor_parallel_size > 1:
        options["tensor_parallel_size"] = parallel.tensor_parallel_size
        if parallel.distributed_executor_backend != "auto":
            options["distributed_executor_backend"] = parallel.distributed_executor_backend
        if not torch.cuda.is_available():
            # vLLM's own choice is a memory node a worker, and most machines have fewer.
            binding = _cores_apart(parallel.tensor_parallel_size)
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", binding)
    from vllm import LLM

    logging.getLogger("vllm").setLevel(logging.ERROR)
    num_threads = torch.get_num_threads()
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    with hidden_module("llvmlite.binding.ffi"), _explained_start(checkpoint):
        llm = LLM(
            str(checkpoint),
            dtype="bfloat16",
            max_num_seqs=num_concurrent,
            max_model_len=max_model_len,
            seed=seed,
            disable_log_stats=True,
            **options,
        )
    try:
        yield VllmPolicy(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if torch.distributed.is_initialized():
            from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

            destroy_model_parallel()
            destroy_distributed_environment()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif affinity:
            os.sched_setaffinity(0, affinity)  # vLLM binds threads to cores
            torch.set_num_threads(num_threads)
