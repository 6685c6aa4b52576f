"""Lightning callbacks; only YAML names them."""

from callbacks.horizon_metrics import HorizonMetrics
from callbacks.requeue import Requeue
from callbacks.tracked_artefacts import TrackedArtefacts

__all__ = ["HorizonMetrics", "Requeue", "TrackedArtefacts"]
