"""Lightning callbacks; only YAML names them."""

from callbacks.horizon_metrics import HorizonMetrics
from callbacks.requeue import Requeue

__all__ = ["HorizonMetrics", "Requeue"]
