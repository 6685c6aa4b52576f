"""A sum over a sum, and work over time."""

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class Ratio(Metric):
    """A sum divided by another: a mean, a share, a rate of adoption; 0 where nothing was counted.

    Unlike a mean, it is well defined on a process that had nothing to count: all processes can
    compute it together.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    numerator: Tensor
    denominator: Tensor

    def __init__(self) -> None:
        """Start at nothing."""
        super().__init__()
        for name in ("numerator", "denominator"):
            self.add_state(name, default=torch.tensor(0.0), dist_reduce_fx="sum")

    @override
    def update(self, numerator: float | Tensor, denominator: float | Tensor) -> None:
        """Add to both sums."""
        self.numerator += numerator
        self.denominator += denominator

    def add(self, values: Tensor) -> None:
        """Add some values and their number."""
        self.update(values.sum(), values.numel())

    @override
    def compute(self) -> Tensor:
        """Return the ratio."""
        share = self.numerator / self.denominator
        return torch.where(self.denominator == 0, torch.zeros_like(share), share)


class Speed(Metric):
    """Work of all processes by the time of the slowest: they work side by side."""

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    amount: Tensor
    seconds: Tensor

    def __init__(self) -> None:
        """Start at nothing."""
        super().__init__()
        self.add_state("amount", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("seconds", default=torch.tensor(0.0), dist_reduce_fx="max")

    @override
    def update(self, amount: float | Tensor, seconds: float) -> None:
        """Add what this process did, and how long it took."""
        self.amount += amount
        self.seconds += seconds

    @override
    def compute(self) -> Tensor:
        """Return the amount a second; 0 where no time has passed."""
        speed = self.amount / self.seconds
        return torch.where(self.seconds == 0, torch.zeros_like(speed), speed)
