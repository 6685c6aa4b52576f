"""Layers that are computed again in backward give the gradients of layers that keep everything."""

from typing import Any

import pytest
import torch
from test_prefixes import SHARING
from test_student import VOCABULARY, module_of, student_of
from torch import Tensor
from toy_language import trajectory_of

from lar_lightning.alignment import align
from lar_lightning.batches import collate
from lar_lightning.distributed.sharding import decoder_layers
from lar_lightning.models import prefixes
from lar_lightning.models.recomputation import recompute
from lar_lightning.module import LatentActionModule

BATCH = collate([align(VOCABULARY, trajectory_of(text)) for text in SHARING])


def made(name: str, trainable: str, *, is_recomputed: bool) -> LatentActionModule:
    module = module_of(student_of(name, VOCABULARY, trainable=trainable))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in module.student.other_parameters:  # adapters start as nothing
            torch.nn.init.normal_(parameter, std=0.1)
    if is_recomputed:
        recompute(decoder_layers(module.student.model))
    return module


def gradients_of(
    module: LatentActionModule, *, is_grounding: bool
) -> tuple[Tensor, dict[str, Any]]:
    if is_grounding:  # adapters are aside in forward, and back in place in backward
        _, hidden = module._hidden(BATCH, is_grounding=True)
        loss = hidden[BATCH.student_rows].square().mean()
    else:
        loss, _ = module.compare(BATCH)
    loss.backward()
    named = module.student.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-untied", "gemma3"])
@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
@pytest.mark.parametrize("is_grounding", [False, True])
@pytest.mark.parametrize("least_saving", [2, 10**9])
def test_gradients_are_those_of_layers_that_keep_everything(
    name: str,
    trainable: str,
    is_grounding: bool,
    least_saving: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also through the keys and values of shared beginnings, and with adapters aside."""
    monkeypatch.setattr(prefixes, "LEAST_SAVING", least_saving)
    loss, found = gradients_of(made(name, trainable, is_recomputed=True), is_grounding=is_grounding)
    expected_loss, expected = gradients_of(
        made(name, trainable, is_recomputed=False), is_grounding=is_grounding
    )
    assert found.keys() == expected.keys()
    torch.testing.assert_close(loss, expected_loss, atol=0, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


def test_adapters_stay_as_they_are_set() -> None:
    module = made("llama-tied", "lora", is_recomputed=True)
    gradients_of(module, is_grounding=True)
    loss, found = gradients_of(module, is_grounding=False)
    module.student.zero_grad()
    expected_loss, _ = gradients_of(
        made("llama-tied", "lora", is_recomputed=False), is_grounding=False
    )
    assert float(loss) == float(expected_loss)
    assert any("lora_A" in name for name in found)


@pytest.mark.parametrize("least_saving", [2, 10**9])
def test_less_is_kept_for_backward(least_saving: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "LEAST_SAVING", least_saving)

    def num_bytes(module: LatentActionModule) -> int:
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in module.student.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            graph = module.student.student_hidden(BATCH.student_ids, BATCH.student_mask)
        assert graph.requires_grad
        return sum(size for place, size in kept.items() if place not in weights)

    less, more = (num_bytes(made("llama-tied", "lora", is_recomputed=r)) for r in (True, False))
    assert less < 0.35 * more
