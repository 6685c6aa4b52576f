"""Lightning callbacks; only YAML names them."""

from callbacks.horizon_metrics import HorizonMetrics

__all__ = ["HorizonMetrics"]
