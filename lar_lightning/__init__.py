"""Latent Action Reparameterization.

Mine an agent's recurring segments, distil a student that acts in them, export it.
"""

__version__ = "0.1.0"
