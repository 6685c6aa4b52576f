"""Lightning callbacks; only YAML names them."""

from callbacks.abstraction_schedule import AbstractionSchedule
from callbacks.collapse_detection import CollapseDetection
from callbacks.horizon_metrics import HorizonMetrics

__all__ = ["AbstractionSchedule", "CollapseDetection", "HorizonMetrics"]
