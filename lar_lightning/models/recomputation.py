"""Activation checkpointing: a decoder layer keeps its input, and is computed again in backward.

Two things would not be then as they were. A layer that reads on from keys and values adds its own
to them, and would add them twice: each run gets a cache that begins as the layer found it, and what
the first run adds is handed on, with its gradient, as an output. And adapters that were set aside
for a pass are back in place in backward: they are set aside again.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lar_lightning.models.switches import CASTS_INPUT, DISABLED, Switch, adapted_layers, switched


def recompute(layers: Iterable[nn.Module]) -> None:
    """Let layers be computed again in backward; their names and parameters stay as they are."""
    for index, layer in enumerate(layers):
        layer.forward = _recomputed(layer, layer.forward, index)


def _recomputed(layer: nn.Module, forward: Callable[..., Any], index: int) -> Callable[..., Any]:
    adapted = adapted_layers(layer)

    def run(*args: Any, past_key_values: Any = None, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, past_key_values=past_key_values, **options)
        found = _switches(adapted)
        cache = past_key_values
        begun = None if cache is None else copy(_cache_layer(cache, index))

        def once(*inputs: Any) -> tuple[Any, Tensor | None, Tensor | None]:
            with switched(found):
                if begun is None or cache is None:
                    return forward(*inputs, past_key_values=None, **options), None, None
                own: Any = copy(cache)
                own.layers = [*cache.layers]
                own.layers[index] = reached = copy(begun)
                output = forward(*inputs, past_key_values=own, **options)
                return output, reached.keys, reached.values

        # Nothing is drawn at random in a pass, so no state of chance is kept.
        output, keys, values = checkpoint(
            once, *args, use_reentrant=False, preserve_rng_state=False
        )
        if past_key_values is not None:
            reached = _cache_layer(past_key_values, index)
            if not reached.is_initialized:
                reached.lazy_initialization(keys, values)
            reached.keys, reached.values = keys, values
        return output

    return run


def _cache_layer(cache: Any, index: int) -> Any:
    while len(cache.layers) <= index:  # made when they are first used
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def _switches(adapted: Sequence[nn.Module]) -> list[Switch]:
    return [
        (module, name, getattr(module, name))
        for module in adapted
        for name in (DISABLED, CASTS_INPUT)
    ]
