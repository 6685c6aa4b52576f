"""How far abstraction can go: stages of a growing latent vocabulary (paper 5.3)."""
