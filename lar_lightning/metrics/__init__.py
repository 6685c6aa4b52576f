"""What is measured while training: counts that add up over batches and processes.

Each metric keeps sums (or a maximum), so that the processes of a run, or parts of a data set, can
be measured apart and merged: `dist_reduce_fx` and `merge_state` give what one process would.
"""

from lar_lightning.metrics.horizon import Horizon
from lar_lightning.metrics.rates import Ratio, Speed
from lar_lightning.metrics.usage import LatentUsage

__all__ = ["Horizon", "LatentUsage", "Ratio", "Speed"]
