"""Rows for latent actions: parameters of their own beside a frozen base vocabulary (algorithm 3).

A gradient mask on a slice of the embedding trains nothing or decays everything; here the new rows
are two parameters of K x D, and the base matrices are never touched. Tied base models keep their
tie: only the new rows differ.

Dimensions: V base tokens, K latents, D hidden units, B trajectories, S positions, L tokens of a
segment.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

Initialization = Literal[
    "constituents", "mean", "weighted", "first_last", "global_mean", "random", "shuffled"
]
STARTS_AT_CHANCE = ("constituents", "first_last")
"""Where an output row starts as that of its first token, and so is as likely."""


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
        self.scale = _scale_of(base)

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


@torch.no_grad()
def _scale_of(embedding: nn.Embedding) -> float:
    """Return what an embedding multiplies its rows by.

    Some architectures (Gemma) scale inside the module; new rows live in the units of the matrix.
    """
    ones = torch.ones_like(embedding.weight[:, :1])
    index = torch.zeros((), dtype=torch.int64, device=ones.device)
    return float(functional_call(embedding, {"weight": ones}, (index,)))


def initial_rows(
    matrix: Float[Tensor, "V D"],
    segments: Sequence[Sequence[int]],
    side: Literal["input", "output"],
    initialization: Initialization = "constituents",
) -> Float[Tensor, "K D"]:
    """Return starting rows in the usual norm: input rows in that of all, output rows of their own.

    An input row should say what its last token says, in the light of all before; an output row
    should be likely where the first token is. So `constituents` starts them at the mean of the
    segment's rows and at the row of its first token; `mean` both at the mean; `weighted` halves
    the weight from token to token, from the last or from the first; `first_last` takes that token
    alone. For ablations: `global_mean` starts all alike, `random` anywhere, and `shuffled` where
    `constituents` would start another latent, so that the student first reads and writes the wrong
    symbols (encoding and expansion stay what they are).
    """
    matrix = matrix.detach().float()
    random = torch.Generator().manual_seed(0 if side == "input" else 1)
    if not segments:
        return matrix[:0].clone()
    norms = matrix.norm(dim=1, keepdim=True)
    if initialization == "random":
        rows = torch.randn(len(segments), matrix.shape[1], generator=random).to(matrix.device)
        norm = norms.median()
    elif initialization == "global_mean":
        rows, norm = matrix.mean(0).expand(len(segments), -1), norms.median()
    else:
        if initialization == "shuffled":
            segments = _deranged(segments)
        rows, norm = (
            torch.stack(
                [
                    _token_weights(len(segment), side, initialization).to(values.device)
                    @ values[list(segment)]
                    for segment in segments
                ]
            )
            for values in (matrix, norms)
        )
    # The norm of an output row says how likely its token is: another would move all its logits.
    norm = norms.median() if side == "input" else norm
    return rows * (norm / rows.norm(dim=1, keepdim=True).clamp_min(1e-12))


def _token_weights(
    length: int, side: Literal["input", "output"], initialization: Initialization
) -> Float[Tensor, " L"]:
    """Return the share of each of a segment's tokens in its row."""
    place = torch.arange(length, dtype=torch.float32)
    distance = place.flip(0) if side == "input" else place  # from the token that counts most
    if initialization == "weighted":
        weights = 0.5**distance
    elif initialization == "mean" or (side == "input" and initialization != "first_last"):
        weights = torch.ones(length)
    else:
        weights = (distance == 0).float()
    return weights / weights.sum()


def _deranged(segments: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return the segments in an order where none stands in its place: a random cycle."""
    order = torch.randperm(len(segments), generator=torch.Generator().manual_seed(0)).tolist()
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [segments[following[index]] for index in range(len(segments))]


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


def root_mean_square(matrix: Float[Tensor, "V D"]) -> float:
    """Return the usual size of an entry."""
    return float(torch.linalg.vector_norm(matrix.detach(), dtype=torch.float32)) / (
        matrix.numel() ** 0.5
    )
