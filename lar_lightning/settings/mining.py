"""Which segments become latent actions."""

import re
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from lar_lightning.errors import SettingError
from lar_lightning.settings.parameter_patterns import PARAMETER_PATTERNS


@dataclass(frozen=True, kw_only=True)
class MiningSettings:
    """What may become a latent action."""

    max_latents: int = 64
    """Budget K. 0 is the control: the same training without latents."""
    min_support: int | float = 0.16
    """Fewest distinct tasks in which a segment occurs: a number, or below 1 a share of the tasks
    that are mined. What few tasks share is content, and seldom the right one elsewhere."""
    max_length: int = 16
    """Longest segment, in base tokens."""
    max_entropy: float = 0.5
    """H_max in nats: a token above it is a decision and only ever begins a segment."""
    min_certain_share: float = 0.9
    """Share of a segment's occurrences that must be free of decisions after the first token."""
    temperature: float | None = None
    """Mine only trajectories sampled at this temperature: that of serving. The others still veto
    unstable texts. None mines all."""
    max_misaligned_share: float = 0.02
    """Largest share of the places of a segment's text where the tokens are others than the
    segment's. Of some hundred tasks, one odd place must not veto what begins every action."""
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
        """Return the fewest of so many tasks in which a segment occurs; by a share, at least 2."""
        share = self.min_support
        return max(ceil(share * num_tasks), 2) if share < 1 else int(share)
