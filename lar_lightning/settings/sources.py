"""Where trajectories come from: rollouts, or recordings of other agents."""

from dataclasses import dataclass
from typing import Literal

from lar_lightning.errors import SettingError
from lar_lightning.settings.engines import EngineName, ParallelSettings

Style = Literal["direct", "cot", "react"]
TooLong = Literal["truncate", "skip"]
RecordingFormat = Literal["auto", "openai", "sharegpt", "swe_agent", "tau_bench"]


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(ParallelSettings):
    """What to roll out, and how."""

    temperatures: tuple[float, ...] = (0.0, 1.0, 1.0)
    """Of the episodes of each training task. 1 is the policy itself, over which the exact loss is
    an expectation; 0 is greedy, as it is served."""
    held_out_temperatures: tuple[float, ...] = (0.0, 1.0)
    """Of the episodes of each held-out task, for validation."""
    style: Style = "direct"
    """How tasks are put to the policy: `direct`, `cot` (thoughts first), `react` (thought, action
    and observation turns); one that the benchmark has."""
    num_held_out: int = 40
    """Tasks kept from mining and training."""
    num_training: int | None = None
    """Most training tasks that are rolled out; all by default."""
    max_tokens: int = 256
    """Most tokens of one action."""
    num_concurrent: int = 64
    """Episodes that decode together."""
    max_model_len: int = 2048
    """Longest prompt with its completion, in tokens."""
    split_seed: int = 0
    """Decides which tasks are held out."""
    engine: EngineName = "auto"
    """`vllm`, `transformers`, `auto` (vLLM where it is installed), or `remote`: a `server`."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "num_concurrent", "max_model_len", "num_held_out"):
            if getattr(self, name) < 1:
                raise SettingError(
                    f"`rollouts.{name}` must be at least 1, got {getattr(self, name)}."
                )
        if self.num_training is not None and self.num_training < 1:
            raise SettingError(
                f"`rollouts.num_training` must be at least 1, got {self.num_training}. Leave it "
                "out to roll out all training tasks."
            )
        for name in ("temperatures", "held_out_temperatures"):
            values = getattr(self, name)
            if not values or min(values) < 0:
                raise SettingError(
                    f"`rollouts.{name}` must be one or more numbers of 0 or more, got {values}."
                )
        self.check_parallel("rollouts", self.engine)


@dataclass(frozen=True, kw_only=True)
class RecordingSettings:
    """Which recordings of other agents to import, and how."""

    paths: tuple[str, ...]
    """JSON Lines, JSON, SWE-agent's .traj or Parquet files (also .gz), folders and globs."""
    format: RecordingFormat = "auto"
    """Of the records; `auto` tells it for each by its keys."""
    num_held_out: float = 0.1
    """Tasks kept from mining and training: a number, or below 1 a share."""
    split_seed: int = 0
    """Decides which tasks are held out."""
    max_model_len: int = 8192
    """Longest episode, in tokens."""
    too_long: TooLong = "truncate"
    """Longer episodes are cut behind the last action that fits, or left out."""
    entropy: Literal["exact", "none"] = "exact"
    """`exact`: one reading of every episode by the policy. `none`: none, and mining cannot tell
    decisions from routine."""
    tokens_per_batch: int = 8192
    """Tokens that the policy reads together for their entropy."""
    is_strict: bool = False
    """Refuse torn or foreign records instead of leaving them out with a warning; `--strict` says it
    for the verbs `import` and `mine`."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise SettingError("`recordings.paths` must name one or more files, got none.")
        for name in ("max_model_len", "tokens_per_batch"):
            if getattr(self, name) < 1:
                raise SettingError(
                    f"`recordings.{name}` must be at least 1, got {getattr(self, name)}."
                )
        number = self.num_held_out
        if not number > 0 or (number > 1 and number != int(number)):
            raise SettingError(
                f"`recordings.num_held_out` must be a share between 0 and 1 or a whole number, got "
                f"{number}."
            )
