"""What a user can set at each stage, with its unit and its rule.

Light to import, so that `--help` is instant.
"""

import re
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from lar_lightning.errors import SettingError
from lar_lightning.parameter_patterns import PARAMETER_PATTERNS

LocalEngineName = Literal["auto", "vllm", "transformers"]
EngineName = LocalEngineName | Literal["remote"]
Style = Literal["direct", "cot", "react"]
TooLong = Literal["truncate", "skip"]
RecordingFormat = Literal["auto", "openai", "sharegpt", "swe_agent", "tau_bench"]


@dataclass(frozen=True, kw_only=True)
class RemoteSettings:
    """Whom the engine `remote` asks, and how patiently."""

    server: tuple[str, ...] | str = ()
    """Address of an OpenAI-compatible server that takes and returns token ids, as vLLM's does
    (http://host:8000); for methods with checkpoints of their own a list, one server each."""
    served_model: str = ""
    """The model's name there. Left empty, it is the one that fits the checkpoint."""
    api_key_variable: str = "VLLM_API_KEY"
    """Environment variable that holds the servers' key, if they want one."""
    request_seconds: float = 600.0
    """Longest wait for an answer before it is asked for again."""
    num_retries: int = 7
    """Times that an answer is asked for again where a server is busy, fails or is gone. The pauses
    double from half a second up to 30: as set here a minute in all, time for a restart."""

    @property
    def servers(self) -> tuple[str, ...]:
        """Addresses, without a path's last slash."""
        named = (self.server,) if isinstance(self.server, str) else self.server
        return tuple(address.rstrip("/").removesuffix("/v1") for address in named if address)

    def check_remote(self, group: str, engine: str) -> None:
        """Refuse what no client can do; `group` is where the settings stand."""
        if bool(self.servers) != (engine == "remote"):
            raise SettingError(
                f"`{group}.server` and `{group}.engine: remote` need each other, got "
                f"{self.server!r} and {engine!r}. Set both, as in `{group}.server: "
                f"http://localhost:8000`, or neither."
            )
        for address in self.servers:
            parts = urlsplit(address)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
                raise SettingError(
                    f"`{group}.server` must be an address such as http://localhost:8000, got "
                    f"{address!r}."
                )
            if parts.username is not None:
                raise SettingError(
                    f"`{group}.server` must hold no user or password, which would stand in logs. "
                    f"Put a key into the environment variable `{group}.api_key_variable`."
                )
        if not self.request_seconds > 0:
            raise SettingError(
                f"`{group}.request_seconds` must be positive, got {self.request_seconds}."
            )
        if self.num_retries < 0:
            raise SettingError(f"`{group}.num_retries` must be at least 0, got {self.num_retries}.")


@dataclass(frozen=True, kw_only=True)
class ParallelSettings(RemoteSettings):
    """Where an engine runs: how it spreads over devices, or on which servers it is."""

    tensor_parallel_size: int = 1
    """Devices that share one copy of the model; vLLM alone can."""
    data_parallel_size: int = 1
    """Copies of the model, each in a process and on devices of its own, that share the requests.
    They change no result but by the rounding of other batches."""
    distributed_executor_backend: Literal["auto", "mp", "ray"] = "auto"
    """What starts vLLM's workers where `tensor_parallel_size` is above 1: processes of this
    machine (`mp`, and what `auto` takes), or Ray, which also reaches other nodes."""

    def check_parallel(self, group: str, engine: EngineName) -> None:
        """Refuse sizes that no engine can have; `group` is where the settings stand."""
        self.check_remote(group, engine)
        for name in ("tensor_parallel_size", "data_parallel_size"):
            if getattr(self, name) < 1:
                raise SettingError(
                    f"`{group}.{name}` must be at least 1, got {getattr(self, name)}."
                )
        size = self.tensor_parallel_size * self.data_parallel_size
        if engine == "remote" and size > 1:
            raise SettingError(
                f"`{group}.tensor_parallel_size` and `{group}.data_parallel_size` must be 1 with "
                f"`{group}.engine: remote`, got {self.tensor_parallel_size} and "
                f"{self.data_parallel_size}: how a server spreads is set where it is started."
            )
        if engine == "transformers" and self.tensor_parallel_size > 1:
            raise SettingError(
                f"`{group}.tensor_parallel_size` must be 1 with `{group}.engine: transformers`, "
                f"got {self.tensor_parallel_size}. Choose the engine vllm, or raise "
                f"`{group}.data_parallel_size`."
            )
        if self.distributed_executor_backend == "ray" and self.data_parallel_size > 1:
            raise SettingError(
                f"`{group}.data_parallel_size` must be 1 with `{group}."
                f"distributed_executor_backend: ray`, got {self.data_parallel_size}: Ray gives out "
                "devices by itself. Choose `mp`, or shard the tasks with `rollout --shard`."
            )


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


@dataclass(frozen=True, kw_only=True)
class MiningSettings:
    """What may become a latent action."""

    max_latents: int = 64
    """Budget K. 0 is the control: the same training without latents."""
    min_support: int | float = 8
    """Fewest distinct tasks in which a segment occurs: a number, or below 1 a share of the tasks
    that are mined."""
    max_length: int = 16
    """Longest segment, in base tokens."""
    max_entropy: float = 2.0
    """H_max in nats: a token above it is a decision and only ever begins a segment."""
    min_certain_share: float = 0.8
    """Share of a segment's occurrences that must be free of decisions after the first token."""
    temperature: float | None = None
    """Mine only trajectories sampled at this temperature: that of serving. The others still veto
    unstable texts. None mines all."""
    max_misaligned_share: float = 0.005
    """Largest share of the places of a segment's text where the tokens are others than the
    segment's."""
    parameter_patterns: tuple[str, ...] = PARAMETER_PATTERNS
    """Regular expressions of values that a task brings with it: no segment contains a part of a
    match."""
    min_slot_values: int = 5
    """A place in the structure that so many different values fill, in as many tasks, is a slot; no
    segment contains its values."""
    max_slot_share: float = 0.15
    """A value in at least this share of a slot's tasks is structure all the same."""
    target_rate: float | None = None
    """Reparameterization rate r to stop at: the share of action tokens inside latents, the most
    certain latents first. None takes all that are found."""
    scaffold_weight: float = 0.0
    """What a prompt token saved counts against a generated one: above 0, system prompts, tool
    schemas and observation wrappers are mined too."""
    epsilon: float = 0.0
    """Largest divergence, in nats, of what the policy does next for two spellings to become one
    latent action. 0 asks the policy nothing and joins none."""
    also: tuple[Path, ...] = ()
    """Folders of other runs of the same base model whose training trajectories are mined too: one
    vocabulary for several benchmarks."""

    def __post_init__(self) -> None:
        if not self.min_support > 0 or (self.min_support > 1 and self.min_support % 1):
            raise SettingError(
                "`mining.min_support` must be a share between 0 and 1 or a whole number of tasks, "
                f"got {self.min_support}."
            )
        rules = {"max_latents": 0, "max_length": 2, "min_slot_values": 2}
        for name, least in rules.items():
            if getattr(self, name) < least:
                raise SettingError(
                    f"`mining.{name}` must be at least {least}, got {getattr(self, name)}."
                )
        if not self.max_entropy > 0:
            raise SettingError(
                f"`mining.max_entropy` must be above 0 nats, got {self.max_entropy}."
            )
        for name in (
            "min_certain_share",
            "max_misaligned_share",
            "max_slot_share",
            "target_rate",
            "scaffold_weight",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise SettingError(f"`mining.{name}` must lie in 0..1, got {value}.")
        if self.scaffold_weight == 1:
            raise SettingError(
                "`mining.scaffold_weight` must be below 1, since a prompt token costs less than a "
                f"generated one, got {self.scaffold_weight}."
            )
        if not self.epsilon >= 0:
            raise SettingError(f"`mining.epsilon` must be 0 nats or more, got {self.epsilon}.")
        for pattern in self.parameter_patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise SettingError(
                    f"`mining.parameter_patterns` must be regular expressions, got {pattern!r} "
                    f"({error})."
                ) from error

    def least_support(self, num_tasks: int) -> int:
        """Return the fewest of so many tasks in which a segment occurs."""
        share = self.min_support
        return max(ceil(share * num_tasks), 1) if share < 1 else int(share)


@dataclass(frozen=True, kw_only=True)
class LoadingSettings:
    """How trajectories come to training."""

    batch_size: int = 8
    """Trajectories a step and process."""
    seed: int = 0
    """Of the order of training trajectories."""
    is_grouped: bool = False
    """Samples of one task come in one batch, which reads their prompt once: faster and leaner, with
    less variety in a step. Validation always does."""
    max_tokens: int | None = None
    """Longest trajectory in expanded tokens. None: what `base_model` reads."""
    too_long: TooLong = "skip"
    """Longer ones are left out, or cut behind the last action that fits."""
    is_padded: bool = False
    """Control (LAR-PT): a latent is read as often as it has base tokens, so that nothing gets
    shorter but what is decided."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"`loading.{name}` must be at least 1, got {value}.")


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """What the student is trained towards; validation always measures the exact divergence."""

    objective: Literal["exact", "truncated_kl", "cross_entropy"] = "exact"
    """`exact`: the divergence of whole trajectories. For ablations: `truncated_kl` compares base
    vocabularies as if there were no latents and adds the cross-entropy of units with
    `split_weight`; `cross_entropy` is that of units alone."""
    pending: Literal["excluded", "residual"] = "excluded"
    """What a latent that was not taken leaves to the tokens behind its beginning. `excluded`:
    nothing, as in the code of the teacher's text: the exact divergence of encoded trajectories.
    `residual`: what the student, as it is, does not give to the latent: that of texts, beside the
    split term; see `residues`."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Of the folded term. Sampled rows, and the student's mass on banned tokens, are charged as by
    the forward KL whatever this says: the reverse KL from a single token is infinite."""
    beta: float = 0.5
    """Weight of the teacher in the mixture of `jsd` (GKD): towards 0 its gradient is that of
    beta times the forward KL, towards 1 that of 1 - beta times the reverse KL."""
    temperature: float = 1.0
    """T of the soft rows: both distributions to the power 1/T, after folding; their divergence
    times T^2. Sampled rows stay at 1, where their token was sampled."""
    split: Literal["nll", "soft", "bernoulli"] = "nll"
    """Target of the split term. `nll`: the unit taken. `soft`: its expectation at the teacher's
    last row that leaves the choice to the next token; as unbiased, with less variance.
    `bernoulli`: that target in ALM's form, taken against not taken, tempered."""
    split_weight: float = 1.0
    """Of the split term; 1 is the exact divergence."""
    split_temperature: float = 100.0
    """tau of `bernoulli`: probabilities to the power 1/tau, their divergence times tau."""
    num_rows_after_latent: int = 0
    """First rows after each latent that count `weight_after_latent` times."""
    weight_after_latent: float = 1.0
    """Of those rows against all others, in the mean over rows."""
    grounding_steps: int = 0
    """Steps before all others that train new rows alone: input rows towards the teacher's hidden
    states after a latent, output rows by cross-entropy of units."""

    def __post_init__(self) -> None:
        for name in ("temperature", "split_temperature", "weight_after_latent"):
            if not getattr(self, name) > 0:
                raise SettingError(
                    f"`distillation.{name}` must be above 0, got {getattr(self, name)}."
                )
        for name in ("split_weight", "num_rows_after_latent", "grounding_steps"):
            if not getattr(self, name) >= 0:
                raise SettingError(
                    f"`distillation.{name}` must be at least 0, got {getattr(self, name)}."
                )
        if not 0 < self.beta < 1:
            raise SettingError(
                f"`distillation.beta` must lie between 0 and 1, got {self.beta}. For the ends "
                "choose the `distillation.divergence` forward_kl or reverse_kl."
            )


@dataclass(frozen=True, kw_only=True)
class OnPolicySettings:
    """The stage after distillation in which the student learns from what it writes itself."""

    share: float = 0.0
    """lambda of GKD: probability that a step of the stage takes trajectories sampled from the
    student instead of the batch's own. 0 leaves the stage out."""
    start_after: float = 0.5
    """Share of all steps that come before the stage."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    """Of the student from the teacher in those steps."""
    beta: float = 0.5
    """Weight of the teacher in the mixture of `jsd`."""
    temperature: float = 1.0
    """At which the student is sampled; 0 is greedy."""
    max_tokens: int = 256
    """Longest action in expanded tokens: a limit in units would favour latents. The last unit may
    cross it."""
    seed: int = 0
    """Of which steps sample, and of what is sampled at each."""
    engine: LocalEngineName = "auto"
    """What samples. `transformers` decodes with the very weights that are trained, and so does
    `auto`. `vllm` keeps an engine open beside training, in its process, and gives it the weights
    before it samples: for one process, with memory for a second copy of the model."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise SettingError(f"`on_policy.share` must lie in 0..1, got {self.share}.")
        if not 0 <= self.start_after < 1:
            raise SettingError(
                f"`on_policy.start_after` must lie in 0..1 without 1, got {self.start_after}. To "
                "leave the stage out, set `on_policy.share` to 0."
            )
        if not 0 < self.beta < 1:
            raise SettingError(
                f"`on_policy.beta` must lie between 0 and 1, got {self.beta}. For the ends choose "
                "the `on_policy.divergence` forward_kl or reverse_kl."
            )
        rules = {"temperature": 0, "max_tokens": 1, "seed": 0}
        for name, least in rules.items():
            if not getattr(self, name) >= least:
                raise SettingError(
                    f"`on_policy.{name}` must be at least {least}, got {getattr(self, name)}."
                )
        if self.engine == "vllm" and self.temperature > 2:
            raise SettingError(
                "`on_policy.temperature` must be at most 2 with `on_policy.engine: vllm`, got "
                f"{self.temperature}. Or choose the engine transformers."
            )


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
