"""What the student writes, sampled by vLLM: an engine beside training, given the current weights.

It is held open for the run and reads the weights in place before it samples, so what it costs is
a second copy of the model and the room for keys and values. It computes in bf16 as a served student
does, rows and merged adapters included; the sampler of `sampling` keeps those in fp32.
"""

import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from lar_lightning.artefacts import explained_disk_errors
from lar_lightning.models.student import Student
from lar_lightning.policies import Request, Sampling, generate
from lar_lightning.policies.vllm_engine import VllmPolicy, open_vllm
from lar_lightning.training.sampling import Sample, cut_at_limit
from lar_lightning.training.served_weights import served_weights, write_served

MAX_MODEL_LEN = 8192
"""Longest prompt with its action that the engine makes room for, in units."""
NUM_CONCURRENT = 64
"""Actions that decode together; a batch of training has fewer."""


class VllmSampler:
    """Samples as `sampling.sample_units` does, from an engine that it opens at first use."""

    def __init__(self, run_dir: Path) -> None:
        """Set up a sampler; the first weights pass through a folder in `run_dir`."""
        self.run_dir = run_dir
        self._engine = ExitStack()
        self._policy: VllmPolicy | None = None

    def max_length(self, student: Student) -> int:
        """Return the most units, written ones included, that the engine reads for a student."""
        return int(min(student.max_length, MAX_MODEL_LEN))

    def sample(
        self,
        student: Student,
        prompts: Sequence[Sequence[int]],
        generator: torch.Generator,
        *,
        stop_units: Collection[int],
        max_tokens: int = 256,
        temperature: float = 1.0,
    ) -> list[Sample]:
        """Continue prompts of units.

        Args:
            student: Whose weights are read first.
            prompts: Units before what is to be written.
            generator: On the CPU; gives each prompt a seed of its own.
            stop_units: That end a turn, as the student's generation settings name them.
            max_tokens: Limit in base tokens. The engine knows units alone and writes as many; what
                lies behind the limit is thrown away.
            temperature: 0 is greedy.
        """
        from lightning.pytorch.utilities.seed import isolate_rng

        seeds = torch.randint(2**62, (len(prompts),), generator=generator).tolist()
        requests = [
            Request(request_id=str(place), prompt_ids=prompt, temperature=temperature, seed=seed)
            for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        with isolate_rng():  # vLLM seeds the generators of the whole process, and draws from them
            policy = self._up_to_date(student)
            completions = list(generate(policy, requests, Sampling(max_tokens=max_tokens)))
        written = {completion.request_id: completion.token_ids for completion in completions}
        return [
            cut_at_limit(student, written[request.request_id], stop_units, max_tokens)
            for request in requests
        ]

    def _up_to_date(self, student: Student) -> VllmPolicy:
        if self._policy is None:
            self._policy = self._opened(student)
        else:
            self._policy.load_weights(served_weights(student, changed_only=True))
        return self._policy

    def _opened(self, student: Student) -> VllmPolicy:
        # The engine has read the folder once it is open.
        with tempfile.TemporaryDirectory(prefix=".student.", dir=self.run_dir) as folder:
            with explained_disk_errors(self.run_dir):
                write_served(student, Path(folder))
            return self._engine.enter_context(
                open_vllm(
                    Path(folder),
                    num_concurrent=NUM_CONCURRENT,
                    max_model_len=self.max_length(student),
                    seed=0,
                    is_beside_training=True,
                )
            )

    def close(self) -> None:
        """Free the engine."""
        self._policy = None
        self._engine.close()
