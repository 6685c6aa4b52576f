"""When a student stops being one: signals of collapse, and a sequential test on each."""

from lar_lightning.collapse.monitor import Alarm, Monitor
from lar_lightning.collapse.signals import DEFAULT_SIGNALS, Signal

__all__ = ["DEFAULT_SIGNALS", "Alarm", "Monitor", "Signal"]
