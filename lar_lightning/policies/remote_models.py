"""Which model on which server is a checkpoint.

The API shows no weights. What is compared: the folder that a model was loaded from, where this
machine has it too, and how the server's tokenizer reads a text that holds latents. Two trainings
with one vocabulary on a machine that shares no files look alike: `served_model` tells them apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lar_lightning.base_models import load_tokenizer, model_fingerprint
from lar_lightning.errors import SettingError, unknown_name
from lar_lightning.policies.remote_server import Missing, RemoteServer
from lar_lightning.settings import RemoteSettings
from lar_lightning.tokenizer import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPENING_RETRIES = 2
"""A server that is not there is told of at once: nothing has been worked for yet."""
NUM_PROBED = 64
"""Added tokens in the text that both tokenizers read."""
PROBE = "def f(x):\n    return 1  # naïve 日本\n"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model on a server."""

    server: RemoteServer
    model: str
    """Its name there."""
    folder: str
    """That the server loaded it from, as the server says."""
    max_model_len: int | None
    """None where the server does not say."""
    evidence: str = ""
    """What speaks for its being the checkpoint."""


def find_served(checkpoint: Path, max_model_len: int, settings: RemoteSettings) -> Served:
    """Return the served model that is a checkpoint.

    Args:
        checkpoint: Of this machine: its tokenizer is needed here too.
        max_model_len: Units that the server must have room for.
        settings: Which servers, and which model of theirs.

    Raises:
        SettingError: if there is none, or no telling which.
    """
    found = [one for address in settings.servers for one in _models_of(address, settings)]
    names = [one.model for one in found]
    if settings.served_model:
        if settings.served_model not in names:
            raise unknown_name(
                "served_model",
                f"be a name that {' or '.join(settings.servers)} knows, one of",
                settings.served_model,
                names,
            )
        found = [one for one in found if one.model == settings.served_model]
    fingerprint = model_fingerprint(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    proven, likely, others = [], [], []
    for one in found:
        folder = Path(one.folder)
        if one.folder and (folder / "config.json").exists():
            is_same = model_fingerprint(folder) == fingerprint
            (proven if is_same else others).append(one)
        else:
            (likely if _reads_alike(one, tokenizer) else others).append(one)
    chosen = (proven or likely)[:1]
    if not chosen:
        raise SettingError(
            f"`server` must have the model of {checkpoint}, but "
            + "; ".join(f"{one.server.address} has {one.model!r}" for one in others)
            + ", with other weights or another tokenizer. Serve it: python -m "
            f"vllm.entrypoints.openai.api_server --model {checkpoint}"
        )
    if not proven and len(likely) > 1:
        raise SettingError(
            f"`served_model` must say which model is {checkpoint}, where its tokenizer fits "
            f"several: {', '.join(repr(one.model) for one in likely)}."
        )
    served = chosen[0]
    if served.max_model_len is not None and served.max_model_len < max_model_len:
        raise SettingError(
            f"`max_model_len` must be at most what {served.server.address} was started with, got "
            f"{max_model_len} for {served.max_model_len}. Lower it, or start the server with "
            f"--max-model-len {max_model_len}."
        )
    evidence = (
        "loaded from the same checkpoint"
        if proven
        else "the same tokenizer; its weights cannot be seen from here"
    )
    return Served(
        server=served.server,
        model=served.model,
        folder=served.folder,
        max_model_len=served.max_model_len,
        evidence=evidence,
    )


def _models_of(address: str, settings: RemoteSettings) -> Iterator[Served]:
    server = RemoteServer(address, settings)
    answer: Any = server.ask("/v1/models", num_retries=min(OPENING_RETRIES, settings.num_retries))
    try:
        for card in answer["data"]:
            yield Served(
                server=server,
                model=str(card["id"]),
                folder=str(card.get("root") or ""),
                max_model_len=card.get("max_model_len"),
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise SettingError(
            f"`server` must be an OpenAI-compatible server, but {address} answers /v1/models with "
            f"{str(answer)[:100]!r}."
        ) from error


def _reads_alike(one: Served, tokenizer: "PreTrainedTokenizerFast") -> bool:
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    text = PROBE + "\n".join(added[-NUM_PROBED:])
    try:
        answer = one.server.ask(
            "/tokenize",
            {"model": one.model, "prompt": text, "add_special_tokens": False},
            num_retries=min(OPENING_RETRIES, one.server.settings.num_retries),
        )
    except Missing:  # a server may keep its tokenizer to itself
        return one.model == one.server.settings.served_model
    return isinstance(answer, dict) and answer.get("tokens") == encode_text(tokenizer, text)
