"""Supervised fine-tuning of a checkpoint on answers, and the tuned model as a checkpoint.

LoRA on all linear layers; the loss is the mean negative log-likelihood of the answers' tokens of a
step, in nats, however they are put into batches. Base weights stay in bf16, adapters are trained in
fp32 and merged at the end, so that what is served is an ordinary Hugging Face folder. An
interrupted training goes on from where it last saved, with the same result.
"""

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from lar_lightning.agents.supervised.samples import (
    EncodedSample,
    Sample,
    encode_sample,
    split_groups,
    turn_end,
)
from lar_lightning.agents.supervised.trainer import SupervisedSettings, SupervisedTrainer
from lar_lightning.artefacts import replacing_folder
from lar_lightning.base_models import load_tokenizer, model_fingerprint, tokenizer_fingerprint
from lar_lightning.errors import SettingError

REPORT_FILE = "supervised.json"
"""In the tuned checkpoint: what it was made from, and its losses."""
STATE_FILE = "adapter.pt"
"""Beside it while training goes on: adapters and optimizer."""


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """A fine-tuned checkpoint and what is known about its training."""

    checkpoint: Path
    num_training: int
    num_validation: int
    num_too_long: int
    loss_before: float
    """Nats of an answer token of the validation samples (of all, where there are none)."""
    loss_after: float


def fine_tune(
    base: Path, samples: Sequence[Sample], folder: Path, settings: SupervisedSettings
) -> FineTuned:
    """Train on samples and write `folder/checkpoint`; one of the same inputs is reused.

    Args:
        base: Checkpoint that is tuned.
        samples: What it is tuned on.
        folder: Of this training alone.
        settings: How.

    Raises:
        SettingError: if no sample is short enough, or the loss is no longer finite.
    """
    tokenizer = load_tokenizer(base)
    end = turn_end(tokenizer)
    encoded = [encode_sample(tokenizer, sample, end) for sample in samples]
    signature = _signature(base, tokenizer_fingerprint(tokenizer), encoded, settings)
    target = folder / "checkpoint"
    if (report := read_report(target)) and report.pop("made_from") == signature:
        print(f"fine-tuning: reused {target}", flush=True)
        return FineTuned(checkpoint=target, **report)
    fitting = [sample for sample in encoded if len(sample.ids) <= settings.max_length]
    if not fitting:
        raise SettingError(
            f"`max_length` must hold a sample, got {settings.max_length} where the shortest of "
            f"{len(encoded)} has {min((len(s.ids) for s in encoded), default=0)} tokens. Raise it."
        )
    if len(fitting) < len(encoded):
        print(
            f"fine-tuning: of {len(encoded)} samples, {len(encoded) - len(fitting)} are left out, "
            f"longer than {settings.max_length} tokens",
            flush=True,
        )
    training, validation = split_groups(fitting, settings.validation_share, settings.seed)
    model, before, after = _trained(base, settings, training, validation, folder, signature)
    report = {
        "num_training": len(training),
        "num_validation": len(validation),
        "num_too_long": len(encoded) - len(fitting),
        "loss_before": before,
        "loss_after": after,
    }
    with replacing_folder(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / REPORT_FILE).write_text(
            json.dumps({"made_from": signature, **report}, indent=2) + "\n", encoding="utf-8"
        )
    del model
    _free_memory()
    (folder / STATE_FILE).unlink(missing_ok=True)
    print(f"fine-tuning: made {target}, loss {before:.4f} -> {after:.4f}", flush=True)
    return FineTuned(checkpoint=target, **report)


def read_report(checkpoint: Path) -> dict[str, Any] | None:
    """Return what a tuned checkpoint says of itself, or None where it is none."""
    path = checkpoint / REPORT_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _trained(
    base: Path,
    settings: SupervisedSettings,
    training: Sequence[EncodedSample],
    validation: Sequence[EncodedSample],
    folder: Path,
    signature: str,
) -> tuple[Any, float, float]:
    """Return the plain model with adapters merged, and its losses before and after."""
    trainer = SupervisedTrainer(base, settings)
    before, after = trainer.train(training, validation or training, folder / STATE_FILE, signature)
    return trainer.merged(), before, after


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _signature(
    base: Path, tokenizer: str, samples: Sequence[EncodedSample], settings: SupervisedSettings
) -> str:
    decisive = asdict(replace(settings, tokens_per_batch=None))  # a step that did not fit goes on
    content = [model_fingerprint(base), tokenizer, decisive, [asdict(s) for s in samples]]
    return sha256(json.dumps(content).encode()).hexdigest()[:16]
