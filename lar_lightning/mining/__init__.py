"""Mining latent actions from trajectories: repeats, executability, selection (algorithm 2)."""

from lar_lightning.mining.mine import MiningReport, mine

__all__ = ["MiningReport", "mine"]
