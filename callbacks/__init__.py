"""Lightning callbacks; only YAML names them."""

from callbacks.horizon_metrics import HorizonMetrics
from callbacks.latent_sample_table import LatentSampleTable
from callbacks.requeue import Requeue
from callbacks.row_monitor import RowMonitor
from callbacks.throughput_monitor import ThroughputMonitor
from callbacks.tracked_artefacts import TrackedArtefacts

__all__ = [
    "HorizonMetrics",
    "LatentSampleTable",
    "Requeue",
    "RowMonitor",
    "ThroughputMonitor",
    "TrackedArtefacts",
]
