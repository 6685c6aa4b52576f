"""Horizons before and after reparameterization (paper 3.1, 3.2), generated and prompt apart.

    H_lat = units,  H_eff = base tokens that they stand for,  reduction = 1 - H_lat / H_eff

Dimensions: N generated units.
"""

import torch
from jaxtyping import Int
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class Horizon(Metric):
    """Counts units and the base tokens that they stand for.

    Generated units are what an agent decides, and what latents save; prompt units are only read.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    num_units: Tensor
    num_tokens: Tensor
    num_covered: Tensor
    num_latents: Tensor
    num_prompt_units: Tensor
    num_prompt_tokens: Tensor

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        for name in (
            *("num_units", "num_tokens", "num_covered", "num_latents"),
            *("num_prompt_units", "num_prompt_tokens"),
        ):
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(
        self,
        lengths: Int[Tensor, " N"],
        num_prompt_units: int | Tensor = 0,
        num_prompt_tokens: int | Tensor = 0,
    ) -> None:
        """Count some units.

        Args:
            lengths: Base tokens of each generated unit; above 1 for latents alone.
            num_prompt_units: Units that were read beside them.
            num_prompt_tokens: Base tokens of these.
        """
        is_latent = lengths > 1
        self.num_units += lengths.numel()
        self.num_tokens += lengths.sum()
        self.num_latents += is_latent.sum()
        self.num_covered += lengths[is_latent].sum()
        self.num_prompt_units += num_prompt_units
        self.num_prompt_tokens += num_prompt_tokens

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the figures by name; shares are 0 where nothing was counted.

        horizon_units, horizon_tokens: H_lat and H_eff of what was generated.
        units_per_token: their ratio, 1 where nothing was.
        horizon_reduction: 1 minus it.
        reparameterization_rate: share of generated tokens inside latents.
        prompt_units, prompt_tokens, prompt_reduction: the same of what was read.
        """
        ratio = _ratio(self.num_units, self.num_tokens)
        return {
            "horizon_units": self.num_units,
            "horizon_tokens": self.num_tokens,
            "units_per_token": ratio,
            "horizon_reduction": 1 - ratio,
            "reparameterization_rate": self.num_covered / self.num_tokens.clamp_min(1),
            "prompt_units": self.num_prompt_units,
            "prompt_tokens": self.num_prompt_tokens,
            "prompt_reduction": 1 - _ratio(self.num_prompt_units, self.num_prompt_tokens),
        }


def _ratio(units: Tensor, tokens: Tensor) -> Tensor:
    return torch.where(tokens > 0, units / tokens.clamp_min(1), 1.0)
