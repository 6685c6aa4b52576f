"""Lightning data modules; only YAML names them."""

from data_modules.rollout import RolloutDataModule

__all__ = ["RolloutDataModule"]
