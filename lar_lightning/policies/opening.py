"""What it takes to open one engine, in this process or in another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lar_lightning.policies.policy import PolicyContext
from lar_lightning.settings import ParallelSettings


@dataclass(frozen=True, kw_only=True)
class Opening:
    """One engine, or several copies of it."""

    checkpoint: Path
    engine: Literal["vllm", "transformers"]
    num_concurrent: int
    max_model_len: int
    seed: int
    parallel: ParallelSettings

    def open_here(self) -> PolicyContext:
        """Open one engine in this process, whatever the number of copies."""
        if self.engine == "vllm":
            from lar_lightning.policies.vllm_engine import open_vllm

            return open_vllm(
                self.checkpoint,
                num_concurrent=self.num_concurrent,
                max_model_len=self.max_model_len,
                seed=self.seed,
                parallel=self.parallel,
            )
        from lar_lightning.policies.transformers_engine import open_transformers

        return open_transformers(
            self.checkpoint, num_concurrent=self.num_concurrent, max_model_len=self.max_model_len
        )
