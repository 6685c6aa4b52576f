"""How methods are compared."""

from dataclasses import dataclass

from lar_lightning.errors import SettingError
from lar_lightning.settings.engines import EngineName, ParallelSettings


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(ParallelSettings):
    """How methods are compared."""

    max_tokens: int = 256
    """Longest answer in expanded tokens, for every method alike: a limit in units would favour
    latents."""
    num_runs: int = 2
    """Runs of each method; they differ in batching only, and give the run-to-run floor and the
    spread."""
    num_concurrent: int = 16
    """Episodes that decode together."""
    max_model_len: int = 2048
    """Longest prompt with its answer, in units."""
    engine: EngineName = "auto"
    """`vllm`, `transformers`, `auto` (vLLM where it is installed), or `remote`: a `server`."""
    environment_seconds: float = 60.0
    """Longest step of an environment; an episode whose environment takes longer has failed."""

    def __post_init__(self) -> None:
        if not self.environment_seconds > 0:
            raise SettingError(
                "`evaluation.environment_seconds` must be positive, got "
                f"{self.environment_seconds}."
            )
        for name in ("max_tokens", "num_runs", "num_concurrent", "max_model_len"):
            if getattr(self, name) < 1:
                raise SettingError(
                    f"`evaluation.{name}` must be at least 1, got {getattr(self, name)}."
                )
        self.check_parallel("evaluation", self.engine)


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """Which tasks and seeds a comparison of methods is made with."""

    seeds: tuple[int, ...] = (0,)
    """Of training. Methods that learn nothing play alike under each, and are played once."""
    num_held_out: int = 40
    """Held-out tasks of each benchmark: all methods play these."""
    num_training: int | None = None
    """Most training tasks of each benchmark that methods may learn from; all by default."""
    split_seed: int = 0
    """Decides which tasks are held out, where the benchmark has no split of its own, and which of
    its held-out tasks are drawn, where it has one."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SettingError(
                f"`grid.seeds` must be one or more different numbers, got {self.seeds}."
            )
        for name in ("num_held_out", "num_training"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"`grid.{name}` must be at least 1, got {value}.")
