"""CUSUM: has a sequence left its level?

Page 1954, Continuous Inspection Schemes, Biometrika 41. Of standardised values z_t, bad upwards,

    S_t = max(0, S_{t-1} + min(z_t - k, h / patience)),    alarm where S_t >= h.

k, the allowance, is half of the smallest shift that matters; h, the threshold, buys rare false
alarms. With the cap off and normal z of mean -d + k the mean number of values until a false alarm
is near (exp(2 d b) - 2 d b - 1) / (2 d^2), b = h + 1.166 (Siegmund 1985, Sequential Analysis,
2.5); a shift of s is found after about h / (s - k) values. The cap is patience: one outlier,
however large, never alarms.
"""

from dataclasses import dataclass

ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Of one test."""

    allowance: float = 1.5
    """k, in spreads of the reference."""
    threshold: float = 8.0
    """h, in the same unit."""
    patience: int = 1
    """Fewest values that an alarm needs."""

    def next_sum(self, total: float, deviation: float) -> float:
        """Return S_t from S_{t-1} and z_t."""
        gain = min(deviation - self.allowance, self.threshold / self.patience)
        return max(0.0, total + gain)

    def is_alarm(self, total: float) -> bool:
        """Tell whether a sum is an alarm."""
        return total >= self.threshold * (1 - ROUNDING)


def mean_values_to_false_alarm(drift: float, threshold: float) -> float:
    """Return Siegmund's approximation for normal values that lie `drift` below the allowance."""
    from math import expm1

    boundary = 2 * drift * (threshold + 1.166)
    return (expm1(boundary) - boundary) / (2 * drift**2)
