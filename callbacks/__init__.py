"""Lightning callbacks; only YAML names them."""

from callbacks.abstraction_schedule import AbstractionSchedule
from callbacks.collapse_detection import CollapseDetection
from callbacks.horizon_metrics import HorizonMetrics
from callbacks.latent_sample_table import LatentSampleTable
from callbacks.requeue import Requeue
from callbacks.row_monitor import RowMonitor
from callbacks.success_probe import SuccessProbe
from callbacks.throughput_monitor import ThroughputMonitor
from callbacks.tracked_artefacts import TrackedArtefacts

__all__ = [
    "AbstractionSchedule",
    "CollapseDetection",
    "HorizonMetrics",
    "LatentSampleTable",
    "Requeue",
    "RowMonitor",
    "SuccessProbe",
    "ThroughputMonitor",
    "TrackedArtefacts",
]
