"""What a step does: how it trains, what one device reads in it, over how many devices it is cut."""

from dataclasses import dataclass
from typing import Literal

from lar_lightning.errors import SettingError

Trainable = Literal["rows", "lora", "full"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training step, as one device sees it."""

    trainable: Trainable = "lora"
    """See `model.trainable`."""
    batch_size: int = 1
    """Trajectories a device reads in a step."""
    num_tokens: int = 4096
    """Tokens of a trajectory, as the teacher reads it."""
    num_prompt_tokens: int = 1024
    """Of these, those before the first latent action."""
    units_per_token: float = 0.8
    """Units that the student reads for a token behind the prompt; below 1 by what latents save."""
    action_share: float = 0.75
    """Share of the student's units that are rows of the loss."""
    rows_per_chunk: int = 1024
    """See `model.rows_per_chunk`."""
    num_latents: int = 512
    """Latent actions."""
    lora_rank: int = 16
    """See `model.lora_rank`."""
    is_checkpointed: bool = False
    """Layers are computed again in the backward pass instead of kept (activation checkpointing)."""
    is_padded: bool = False
    """Trajectories of a batch differ in length, so that attention takes a mask."""
    num_shards: int = 1
    """Devices over which weights, gradients and optimizer states are cut (FSDP2)."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_tokens", "rows_per_chunk", "num_shards"):
            if getattr(self, name) < 1:
                raise SettingError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.num_prompt_tokens <= self.num_tokens:
            raise SettingError(
                f"`num_prompt_tokens` must lie in 0..{self.num_tokens} (`num_tokens`), got "
                f"{self.num_prompt_tokens}."
            )
        for name in ("units_per_token", "action_share"):
            if not 0 < getattr(self, name) <= 1:
                raise SettingError(
                    f"`{name}` must lie above 0 and at most at 1, got {getattr(self, name)}."
                )

    @property
    def num_units(self) -> int:
        """Units of a trajectory, as the student reads it."""
        behind = self.num_tokens - self.num_prompt_tokens
        return self.num_prompt_tokens + round(behind * self.units_per_token)

    @property
    def num_constant(self) -> int:
        """Positions that nothing trained reaches: they are read once, without gradient."""
        is_split = self.trainable == "rows" and not self.is_checkpointed
        return self.num_prompt_tokens if is_split else 0

    @property
    def num_learning(self) -> int:
        """Units of a trajectory through which gradients flow."""
        return self.num_units - self.num_constant

    @property
    def num_rows(self) -> int:
        """Rows of the loss in a step."""
        return max(round(self.batch_size * self.num_units * self.action_share), 1)

    @property
    def has_mask(self) -> bool:
        """Whether attention is given a mask, which is kept for each layer."""
        return bool(self.num_constant) or self.is_padded
