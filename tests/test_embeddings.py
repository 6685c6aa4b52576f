from typing import get_args

import pytest
import torch
from torch import nn

from lar_lightning.models.embeddings import (
    ExtendedEmbedding,
    Initialization,
    LatentRows,
    initial_rows,
    initialize_rows,
    merged_matrix,
)

SEGMENTS = [(1, 2), (3, 4, 5), (1, 6)]


def matrix() -> torch.Tensor:
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(0))


def test_input_rows_start_in_the_direction_of_the_mean_at_the_usual_norm() -> None:
    base = matrix()
    rows = initial_rows(base, SEGMENTS, "input")
    for row, segment in zip(rows, SEGMENTS, strict=True):
        mean = base[list(segment)].mean(0)
        torch.testing.assert_close(torch.cosine_similarity(row, mean, dim=0), torch.tensor(1.0))
        torch.testing.assert_close(row.norm(), base.norm(dim=1).median())


def test_output_rows_start_at_the_first_token_so_that_both_get_the_same_logit() -> None:
    base = matrix()
    rows = initial_rows(base, SEGMENTS, "output")
    hidden = torch.randn(6)
    torch.testing.assert_close(rows @ hidden, base[[1, 3, 1]] @ hidden)


@pytest.mark.parametrize("initialization", get_args(Initialization))
@pytest.mark.parametrize("side", ["input", "output"])
def test_every_initialization_gives_rows_of_a_usual_norm(initialization: str, side: str) -> None:
    base = matrix()
    rows = initial_rows(base, SEGMENTS, side, initialization)  # type: ignore[arg-type]
    assert rows.shape == (3, 6)
    norms = base.norm(dim=1)
    assert (rows.norm(dim=1) > 0.999 * norms.min()).all()
    assert (rows.norm(dim=1) < 1.001 * norms.max()).all()
    empty = initial_rows(base, [], side, initialization)  # type: ignore[arg-type]
    assert empty.shape == (0, 6)


@pytest.mark.parametrize(
    ("initialization", "side", "weights"),
    [
        ("mean", "output", [1, 1, 1]),
        ("weighted", "input", [1, 2, 4]),
        ("weighted", "output", [4, 2, 1]),
        ("first_last", "input", [0, 0, 1]),
        ("first_last", "output", [1, 0, 0]),
    ],
)
def test_initializations_weigh_the_tokens_of_a_segment(
    initialization: str, side: str, weights: list[float]
) -> None:
    base = matrix()
    row = initial_rows(base, SEGMENTS, side, initialization)[1]  # type: ignore[arg-type]
    expected = torch.tensor(weights, dtype=torch.float32) @ base[[3, 4, 5]]
    torch.testing.assert_close(torch.cosine_similarity(row, expected, dim=0), torch.tensor(1.0))


@pytest.mark.parametrize("side", ["input", "output"])
def test_shuffled_rows_are_those_of_other_latents(side: str) -> None:
    right = initial_rows(matrix(), [(1, 2), (3, 4, 5), (6, 7)], side)  # type: ignore[arg-type]
    wrong = initial_rows(matrix(), [(1, 2), (3, 4, 5), (6, 7)], side, "shuffled")  # type: ignore[arg-type]
    same = (right[:, None] == wrong[None]).all(2)
    assert (same.sum(0) == 1).all()
    assert (same.sum(1) == 1).all()
    assert not same.diagonal().any()


def test_random_rows_for_reading_and_writing_differ() -> None:
    sides = [initial_rows(matrix(), SEGMENTS, side, "random") for side in ("input", "output")]  # type: ignore[arg-type]
    assert not torch.allclose(sides[0], sides[1])


def test_global_mean_collapses_all_rows_into_one() -> None:
    rows = initial_rows(matrix(), SEGMENTS, "input", "global_mean")
    assert (rows == rows[0]).all()


def extended() -> tuple[nn.Embedding, LatentRows, ExtendedEmbedding]:
    base = nn.Embedding.from_pretrained(matrix(), freeze=True)
    rows = LatentRows(len(SEGMENTS), 6)
    initialize_rows(rows, base.weight, base.weight, SEGMENTS)
    return base, rows, ExtendedEmbedding(base, rows, base_size=10)


def test_extended_embedding_reads_base_tokens_and_latents() -> None:
    base, rows, embedding = extended()
    embedded = embedding(torch.tensor([[0, 11, 9], [10, 12, 1]]))
    expected = torch.stack([base.weight[0], rows.input_rows[1], base.weight[9]])
    torch.testing.assert_close(embedded[0], expected)
    torch.testing.assert_close(embedded[1, 0], rows.input_rows[0])


def test_new_rows_move_and_old_ones_do_not_under_weight_decay() -> None:
    base, rows, embedding = extended()
    before = base.weight.clone(), rows.input_rows.detach().clone()
    parameters = [parameter for parameter in embedding.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
    embedding(torch.tensor([[0, 10, 3]])).square().sum().backward()
    optimizer.step()
    assert torch.equal(base.weight, before[0])
    assert not torch.equal(rows.input_rows[0], before[1][0])


def test_embedding_that_scales_scales_latents_alike() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 3.0

    base = Scaled(10, 6)
    rows = LatentRows(3, 6)
    initialize_rows(rows, base.weight, base.weight, SEGMENTS)
    embedding = ExtendedEmbedding(base, rows, base_size=10)
    torch.testing.assert_close(embedding(torch.tensor([[11]]))[0, 0], 3.0 * rows.input_rows[1])


@pytest.mark.parametrize(("num_base_rows", "expected"), [(10, 13), (12, 13), (20, 20)])
def test_merged_matrix_puts_latents_behind_the_tokenizer_and_keeps_spare_rows(
    num_base_rows: int, expected: int
) -> None:
    base = torch.arange(num_base_rows * 6.0).reshape(num_base_rows, 6)
    rows = -torch.ones(3, 6)
    merged = merged_matrix(base, rows, 10)
    assert len(merged) == expected
    assert torch.equal(merged[:10], base[:10])
    assert torch.equal(merged[10:13], rows)
    assert torch.equal(merged[13:], base[13:])
