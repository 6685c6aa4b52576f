"""What a user can set at each stage, with its unit and its rule.

Light to import, so that `--help` is instant.
"""

from lar_lightning.settings.engines import (
    EngineName,
    LocalEngineName,
    ParallelSettings,
    RemoteSettings,
)
from lar_lightning.settings.evaluation import EvaluationSettings, GridSettings
from lar_lightning.settings.mining import MiningSettings
from lar_lightning.settings.sources import (
    RecordingFormat,
    RecordingSettings,
    RolloutSettings,
    Style,
    TooLong,
)
from lar_lightning.settings.training import (
    DistillationSettings,
    LoadingSettings,
    OnPolicySettings,
)

__all__ = [
    "DistillationSettings",
    "EngineName",
    "EvaluationSettings",
    "GridSettings",
    "LoadingSettings",
    "LocalEngineName",
    "MiningSettings",
    "OnPolicySettings",
    "ParallelSettings",
    "RecordingFormat",
    "RecordingSettings",
    "RemoteSettings",
    "RolloutSettings",
    "Style",
    "TooLong",
]
