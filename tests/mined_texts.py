"""Trajectories of texts that share a frame, and what mining them takes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import MiningSettings
from lar_lightning.tokenizer import decode, encode_text
from lar_lightning.trajectories import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    Make = Callable[..., Trajectory]

NAMES = ("numbers", "strings", "text", "letter", "current", "threshold", "total", "longest")
LOOSE = MiningSettings(
    max_latents=12,
    min_support=4,
    max_entropy=2.0,
    min_certain_share=0.8,
    max_misaligned_share=0.1,
)
"""Eight places of a text are few, and say little about the next."""
FRAME = (
    "def {0}({0}):\n    result = []\n"
    "    for letter in {0}:\n        result.append({0})\n    return result\n"
)


def loops(make: "Make") -> list[Trajectory]:
    """Eight tasks whose answers share their frame and differ in a name."""
    return [make(FRAME.format(name), task_id=name) for name in NAMES]


def framed(make: "Make", text: str, **fields: object) -> list[Trajectory]:
    """Eight tasks that write the same between names of their own."""
    return [make(f"{name}{text}{name}", task_id=name, **fields) for name in NAMES]


def segment_texts(vocabulary: LatentVocabulary) -> list[str]:
    return [latent.text for latent in vocabulary.latents]


def action_ids(trajectory: Trajectory) -> list[list[int]]:
    return [
        trajectory.token_ids[span.start : span.end].tolist() for span in trajectory.action_spans
    ]


def entropies_of(
    tokenizer: "PreTrainedTokenizerFast", text: str, decision: str, nats: float
) -> list[float]:
    """One entropy a token of `text` and its end: `nats` at `decision`, else little."""
    ids = encode_text(tokenizer, text)
    return [*(nats if decode(tokenizer, [token]) == decision else 0.1 for token in ids), 0.1]
