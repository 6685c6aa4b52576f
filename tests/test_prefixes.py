"""Reading what sequences share once gives what reading each of them whole gives."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_student import ARCHITECTURES, VOCABULARY, module_of, random_model, student_of
from torch import Tensor
from toy_language import trajectory_of

from lar_lightning.alignment import align
from lar_lightning.batches import collate
from lar_lightning.models import prefixes
from lar_lightning.models.prefixes import Group, groups_of, read

BASE = VOCABULARY.base_size
SHARING = ["abcabddab", "abcabddbcabcacd", "dcaabd", "abcabddabcab", "dcaabdca"]


def padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    length = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (length - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences])
    return ids, mask


@given(
    sequences=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=6),
    least=st.integers(1, 8),
)
def test_groups_part_a_batch_and_share_what_they_say(
    sequences: list[list[int]], least: int
) -> None:
    ids, mask = padded(sequences)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "LEAST_SAVING", least)
        groups = groups_of(ids, mask)
    assert sorted(row for group in groups for row in group.members) == list(range(len(sequences)))
    for group in groups:
        heads = {tuple(sequences[row][: group.num_shared]) for row in group.members}
        assert len(heads) == 1 or not group.num_shared
        assert all(len(sequences[row]) > group.num_shared for row in group.members)
        assert group.num_shared == 0 or group.num_shared * (len(group.members) - 1) >= least


def test_little_in_common_is_not_worth_a_group() -> None:
    ids, mask = padded([[1, 2, 3], [1, 2, 4]])
    assert groups_of(ids, mask) == [Group([0, 1], 0)]


def whole(model: Any, ids: Tensor, mask: Tensor, **_: Any) -> Tensor:
    backbone = getattr(model, model.base_model_prefix)
    return backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_reading_is_whole_reading(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "LEAST_SAVING", 2)
    config = deepcopy(ARCHITECTURES[name])
    config.sliding_window = 4  # for those that have one: shorter than what is shared
    model = random_model(config).eval()
    ids, mask = padded([[1, 2, 3, 4, 5, 6], [3, 1], [1, 2, 3, 4, 5, 7, 8, 9], [3, 2, 1]])
    assert any(group.num_shared for group in groups_of(ids, mask))
    found, expected = read(model, ids, mask), whole(model, ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-untied", "gemma3"])
@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
def test_loss_and_gradients_are_those_of_whole_reading(
    name: str, trainable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate([align(VOCABULARY, trajectory_of(text)) for text in SHARING])
    module = module_of(student_of(name, VOCABULARY, trainable=trainable))
    student = module.student
    for parameter in student.other_parameters:  # adapters start as nothing
        torch.nn.init.normal_(parameter, std=0.1)
    results = []
    for least in (2, 10**9):
        monkeypatch.setattr(prefixes, "LEAST_SAVING", least)
        if least > 2:
            monkeypatch.setattr("lar_lightning.models.student.read", whole)
        student.zero_grad()
        loss, _ = module.compare(batch, module.distillation)
        loss.backward()
        gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (loss, gradients), (expected_loss, expected) = results
    assert gradients.keys() == expected.keys()
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)


def test_what_comes_before_the_first_latent_is_read_without_gradient() -> None:
    """Where only rows are trained: no position before it keeps anything for a backward."""
    model = random_model(ARCHITECTURES["llama-tied"]).eval()
    embedding = model.get_input_embeddings()
    calls: list[tuple[int, bool]] = []
    embedding.register_forward_hook(
        lambda _, inputs, __: calls.append((inputs[0].shape[1], torch.is_grad_enabled()))
    )
    ids, mask = padded([[1, 2, 3, 11, 5], [1, 2, 3, 4, 11]])
    read(model, ids, mask, first_trained=11)
    assert calls == [(3, False), (2, True)]
