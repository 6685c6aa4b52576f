"""What a step reads, and what the student is trained towards."""

from dataclasses import dataclass
from typing import Literal

from lar_lightning.errors import SettingError
from lar_lightning.settings.engines import LocalEngineName
from lar_lightning.settings.sources import TooLong


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
