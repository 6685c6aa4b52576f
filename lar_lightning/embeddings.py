"""Rows for latent actions: parameters of their own beside a frozen base vocabulary (algorithm 3).

A gradient mask on a slice of the embedding trains nothing or decays everything; here the new rows
are two parameters of K x D, and the base matrices are never touched. Tied base models keep their
tie: only the new rows differ.

Dimensions: V base tokens, K latents, D hidden units, B trajectories, S positions.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Initialization = Literal["constituents", "global_mean", "random"]


class LatentRows(nn.Module):
    """Input and output rows of K latents, in fp32."""

    def __init__(self, num_latents: int, hidden_size: int) -> None:
        """Make rows of zeros; `initialize_rows` gives them their start."""
        super().__init__()
        self.input_rows = nn.Parameter(torch.zeros(num_latents, hidden_size))
        self.output_rows = nn.Parameter(torch.zeros(num_latents, hidden_size))


class ExtendedEmbedding(nn.Module):
    """Input embedding of base tokens and latents; stands where the model's own embedding stood."""

    def __init__(self, base: nn.Embedding, rows: LatentRows, base_size: int) -> None:
        """Wrap `base`; ids from `base_size` on are latents."""
        super().__init__()
        self.base = base
        self.rows = rows
        self.base_size = base_size
        # Some architectures (Gemma) scale inside their embedding module; new rows live in the
        # units of the matrix.
        probe = base.weight.detach()[1].float().norm()
        scaled = (
            base(torch.ones((), dtype=torch.int64, device=base.weight.device))
            .detach()
            .float()
            .norm()
        )
        self.scale = float(scaled / probe) if probe > 0 else 1.0

    @property
    def weight(self) -> Tensor:
        """The base matrix, for code that asks an embedding for its weight."""
        return self.base.weight

    def forward(self, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        """Embed units."""
        is_latent = ids >= self.base_size
        embedded = self.base(ids.masked_fill(is_latent, 0))
        latents = self.rows.input_rows[ids[is_latent] - self.base_size] * self.scale
        return embedded.index_put((is_latent,), latents.to(embedded.dtype))


def initial_rows(
    matrix: Float[Tensor, "V D"],
    segments: Sequence[Sequence[int]],
    side: Literal["input", "output"],
    initialization: Initialization = "constituents",
) -> Float[Tensor, "K D"]:
    """Return starting rows for latents.

    `constituents` starts input rows at the mean of the segment's rows and output rows at the row
    of its first token, rescaled to the usual norm of a row: the head then gives a latent the logit
    of the token that it begins with. The global mean and random rows are for ablations.
    """
    matrix = matrix.detach().float()
    norm = matrix.norm(dim=1).median()
    if initialization == "random":
        rows = torch.randn(
            len(segments), matrix.shape[1], generator=torch.Generator().manual_seed(0)
        )
        rows = rows.to(matrix.device)
    elif initialization == "global_mean":
        return matrix.mean(0).expand(len(segments), -1).clone()
    elif side == "input":
        rows = torch.stack([matrix[list(segment)].mean(0) for segment in segments])
    else:
        return matrix[[segment[0] for segment in segments]].clone()
    return rows * (norm / rows.norm(dim=1, keepdim=True).clamp_min(1e-12))


@torch.no_grad()
def initialize_rows(
    rows: LatentRows,
    input_matrix: Float[Tensor, "V D"],
    output_matrix: Float[Tensor, "V D"],
    segments: Sequence[Sequence[int]],
    initialization: Initialization = "constituents",
) -> None:
    """Give both matrices of rows their start."""
    rows.input_rows.copy_(initial_rows(input_matrix, segments, "input", initialization))
    rows.output_rows.copy_(initial_rows(output_matrix, segments, "output", initialization))


def merged_matrix(
    base: Float[Tensor, "V D"], rows: Float[Tensor, "K D"], base_size: int
) -> Float[Tensor, "R D"]:
    """Put latent rows behind the first `base_size` base rows.

    Spare rows of the base that are left stay behind them.
    """
    spare = base[base_size + len(rows) :]
    return torch.cat([base[:base_size], rows.to(base.dtype), spare])
