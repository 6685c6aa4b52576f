"""Shapes of decoders of the Llama kind, from their `config.json`: parameters and linear layers.

Dimensions: L layers, D hidden units, I units of the feed-forward part, H heads of queries and G of
keys, E units of a head, V base tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lar_lightning.errors import SettingError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What an estimate needs to know of a base model."""

    name: str
    num_layers: int
    hidden_size: int
    feed_forward_size: int
    num_heads: int
    num_key_heads: int
    head_size: int
    vocabulary_size: int
    is_tied: bool = False
    """Input and output matrix are one."""
    has_head_norms: bool = False
    """Queries and keys are normalised head by head, as in Qwen3."""

    @property
    def query_size(self) -> int:
        """Units of all queries of a position."""
        return self.num_heads * self.head_size

    @property
    def key_size(self) -> int:
        """Units of all keys of a position; values have as many."""
        return self.num_key_heads * self.head_size

    @property
    def linear_shapes(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a layer's matrices: q, k, v, o, gate, up, down."""
        hidden, wide = self.hidden_size, self.feed_forward_size
        return (
            (hidden, self.query_size),
            (hidden, self.key_size),
            (hidden, self.key_size),
            (self.query_size, hidden),
            (hidden, wide),
            (hidden, wide),
            (wide, hidden),
        )

    @property
    def linear_parameters(self) -> int:
        """Of one layer."""
        return sum(size * outputs for size, outputs in self.linear_shapes)

    @property
    def layer_parameters(self) -> int:
        """Of one layer, norms included."""
        norms = 2 * self.hidden_size + 2 * self.head_size * self.has_head_norms
        return self.linear_parameters + norms

    @property
    def matrix_parameters(self) -> int:
        """Of the input matrix, and of the output matrix."""
        return self.vocabulary_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        matrices = self.matrix_parameters * (1 if self.is_tied else 2)
        return self.num_layers * self.layer_parameters + matrices + self.hidden_size

    def adapter_parameters(self, rank: int) -> int:
        """Return the parameters of adapters on all linear layers."""
        return self.num_layers * rank * sum(map(sum, self.linear_shapes))


PRESETS = {
    "qwen3-8b": Backbone(
        name="Qwen3-8B",
        num_layers=36,
        hidden_size=4096,
        feed_forward_size=12_288,
        num_heads=32,
        num_key_heads=8,
        head_size=128,
        vocabulary_size=151_936,
        has_head_norms=True,
    ),
    "llama-3.1-8b": Backbone(
        name="Llama-3.1-8B",
        num_layers=32,
        hidden_size=4096,
        feed_forward_size=14_336,
        num_heads=32,
        num_key_heads=8,
        head_size=128,
        vocabulary_size=128_256,
    ),
    "qwen3-32b": Backbone(
        name="Qwen3-32B",
        num_layers=64,
        hidden_size=5120,
        feed_forward_size=25_600,
        num_heads=64,
        num_key_heads=8,
        head_size=128,
        vocabulary_size=151_936,
        has_head_norms=True,
    ),
    "llama-3.1-70b": Backbone(
        name="Llama-3.1-70B",
        num_layers=80,
        hidden_size=8192,
        feed_forward_size=28_672,
        num_heads=64,
        num_key_heads=8,
        head_size=128,
        vocabulary_size=128_256,
    ),
}
"""By the numbers of the published `config.json` files."""

HEAD_NORM_TYPES = ("qwen3", "qwen3_moe", "olmo2", "gemma3_text")


def backbone_of(name: str) -> Backbone:
    """Return a preset, or what the `config.json` of a checkpoint folder says."""
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    file = Path(name) / "config.json"
    if not file.is_file():
        raise unknown_name(
            "backbones", f"name a checkpoint folder (there is no {file}) or one of", name, PRESETS
        )
    return read_backbone(Path(name).name, json.loads(file.read_text(encoding="utf-8")))


def read_backbone(name: str, config: dict[str, Any]) -> Backbone:
    """Return the shape that a configuration describes.

    Raises:
        SettingError: if a number is missing, or layers have experts.
    """
    config = config.get("text_config", config)
    if config.get("num_experts") or config.get("num_local_experts"):
        raise SettingError(
            f"`backbones` must name models whose layers are dense, got {name}, which has experts. "
            "Estimates know no others; measure a step with `tests.benchmarks.accelerator`."
        )
    try:
        heads = config["num_attention_heads"]
        return Backbone(
            name=name,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            feed_forward_size=config["intermediate_size"],
            num_heads=heads,
            num_key_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary_size=config["vocab_size"],
            is_tied=config.get("tie_word_embeddings", False),
            has_head_norms=config.get("model_type") in HEAD_NORM_TYPES,
        )
    except KeyError as error:
        raise SettingError(
            f"`backbones` must name models of the Llama kind, got {name}, whose config.json has no "
            f"{error}. Estimates know no others."
        ) from error
