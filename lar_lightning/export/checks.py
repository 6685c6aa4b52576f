"""An export against what was trained, before it takes its place.

It is loaded from disk as any engine would load it, and asked four things: that its tokenizer fits
its matrices and keeps the base model's chat template; that every text of the run's corpus comes
back as it was; that the rows of latents are the trained ones, bit by bit; and that its logits are
the trained student's.

Logits are equal up to rounding. Of both, the distance is measured in root mean squares of the
logits, over all base tokens, and for each latent over its rows: a latent that is wrong must not
hide behind those that are right.

Dimensions: P probes, S positions, R rows looked at, V base tokens, K latents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lar_lightning.base_models import load_tokenizer
from lar_lightning.errors import SettingError
from lar_lightning.export.reencoding import Reencoder, conversation_of, sum_of
from lar_lightning.models.student import Student
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tokenizer import decode, encode_text
from lar_lightning.trajectories import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

NUM_PROBES, PROBE_UNITS, PROBE_ROWS = 4, 96, 32
"""Sequences that trained and exported model read, their length, and the last rows of each that are
compared."""
MAX_CORPUS_TOKENS = 1_000_000
"""Of each split that is sent through the tokenizer."""
TOLERANCE = 0.2
"""Largest distance of logits. The student computes in bfloat16 whatever the export's precision is,
and merged adapters are rounded to the export's: after training SmolLM2-135M with adapters both move
logits by 0.05. There, two latents with each other's rows are off by 1.5."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the trained student says, kept from before it is merged and written."""

    probes: tuple[tuple[int, ...], ...]
    """Units."""
    logits: Tensor
    """Float32 (P R U), over the base tokens and behind them the latents."""
    input_rows: Tensor
    output_rows: Tensor


def corpus_of(run_dir: Path, split: str) -> list[Trajectory]:
    """Return a run's trajectories up to a limit; none where it has no such file."""
    from lar_lightning.run_folder import trajectory_path
    from lar_lightning.trajectories import read_trajectories, trajectory_files

    path = trajectory_path(run_dir, split)  # type: ignore[arg-type]
    found: list[Trajectory] = []
    num_tokens = 0
    for trajectory in read_trajectories(path) if trajectory_files(path) else ():
        num_tokens += len(trajectory.token_ids)
        if found and num_tokens > MAX_CORPUS_TOKENS:
            break
        found.append(trajectory)
    return found


def probes_of(
    vocabulary: LatentVocabulary, run_dir: Path, max_length: float
) -> tuple[tuple[int, ...], ...]:
    """Return what both models are to read: beginnings of held-out episodes, and latents in a row.

    All are equally long.
    """
    episodes = corpus_of(run_dir, "held_out")[: NUM_PROBES - 1]
    probes = [
        [unit for _, units in conversation_of(episode, vocabulary) for unit in units]
        for episode in episodes
    ]
    first = vocabulary.base_size
    latents = range(first, first + len(vocabulary)) if len(vocabulary) else range(min(first, 96))
    probes.append([latents[index % len(latents)] for index in range(PROBE_UNITS)])
    length = int(min(PROBE_UNITS, max_length, *map(len, probes)))
    return tuple(tuple(probe[:length]) for probe in probes)


@torch.no_grad()
def reference_of(student: Student, probes: tuple[tuple[int, ...], ...]) -> Reference:
    """Ask the trained student."""
    heads = student.heads
    rows = [
        student.student_hidden(units, torch.ones_like(units))[0, -PROBE_ROWS:]
        for units in _batches(probes)
    ]
    hidden = torch.stack(rows)
    base = (hidden.to(heads.base.dtype) @ heads.base.T).float()
    return Reference(
        probes=probes,
        logits=torch.cat([base, hidden.float() @ heads.latent.float().T], dim=2),
        input_rows=student.rows.input_rows[: student.num_active].detach().clone(),
        output_rows=student.rows.output_rows[: student.num_active].detach().clone(),
    )


def _batches(probes: tuple[tuple[int, ...], ...]) -> Iterator[Tensor]:
    for probe in probes:
        yield torch.tensor([probe], dtype=torch.int64)


def check_export(
    folder: Path, base: Path, vocabulary: LatentVocabulary, reference: Reference, run_dir: Path
) -> dict[str, Any]:
    """Hold an export on disk against what was trained, and return what was found.

    Raises:
        SettingError: naming the check that failed.
    """
    found = check_tokenizer_of(folder, base, vocabulary, run_dir)
    return found | check_model_of(folder, vocabulary.base_size, reference, found)


def check_tokenizer_of(
    folder: Path, base: Path, vocabulary: LatentVocabulary, run_dir: Path
) -> dict[str, Any]:
    """Send the run's corpus through the tokenizer on disk."""
    tokenizer, base_tokenizer = load_tokenizer(folder), load_tokenizer(base)
    if tokenizer.chat_template != base_tokenizer.chat_template:
        raise _failed("keep the chat template of its base model", "another")
    _check_ids(tokenizer, vocabulary)
    reencoder = Reencoder(tokenizer, vocabulary)
    by_split: dict[str, dict[str, Any]] = {}
    num_texts = 0
    for split in ("held_out", "train"):
        trajectories = corpus_of(run_dir, split)
        num_texts += len(trajectories)
        counts = reencoder.count(conversation_of(each, vocabulary) for each in trajectories)
        by_split[split] = {
            role: {
                "tokens": each.tokens,
                "units": each.units,
                "equal_share": round(each.equal_share, 6),
                "saving": round(each.saving, 4),
            }
            for role, each in {
                "all": sum_of(counts),
                "prompt": sum_of(counts, is_prompt=True),
                **counts,
            }.items()
        }
    for text in reencoder.lost:  # some base tokenizers lack bytes
        if decode(base_tokenizer, encode_text(base_tokenizer, text)) == text:
            raise _failed("give every text of the run's corpus back", f"another for {text[:80]!r}")
    return {"num_texts": num_texts, "num_units": len(tokenizer), "reencoding": by_split}


def _check_ids(tokenizer: "PreTrainedTokenizerFast", vocabulary: LatentVocabulary) -> None:
    for index, latent in enumerate(vocabulary.latents):
        unit = vocabulary.base_size + index
        units = encode_text(tokenizer, latent.text)
        shown = [decode(tokenizer, [unit], skip_special_tokens=skip) for skip in (False, True)]
        if units != [unit] or shown != [latent.text] * 2:
            raise _failed(
                "read and write each latent as one unit that is its text",
                f"{units} and {shown[0]!r} for latent {unit}, {latent.text!r}",
            )


@torch.no_grad()
def check_model_of(
    folder: Path, base_size: int, reference: Reference, found: dict[str, Any]
) -> dict[str, Any]:
    """Load the model from disk and compare it with the trained one."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    model, info = loaded[0].eval(), loaded[1]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise _failed("have all weights of its model, and no others", f"{kind}: {info[kind]}")
    num_rows = _check_rows(model, base_size, reference)
    if not found["num_units"] <= model.config.vocab_size == num_rows:
        raise _failed(
            "have a row for every unit of its tokenizer",
            f"{num_rows} rows and vocab_size {model.config.vocab_size} for {found['num_units']}",
        )
    logits = torch.stack(
        [
            model(input_ids=units, use_cache=False).logits[0, -PROBE_ROWS:].float()
            for units in _batches(reference.probes)
        ]
    )[..., : reference.logits.shape[2]]
    distances = logit_distances(logits, reference.logits, base_size)
    worst = max(distances.values())
    if not worst <= TOLERANCE:
        raise _failed(
            f"have the trained student's logits, up to {TOLERANCE} of their size",
            f"{', '.join(f'{name} {value:.3g}' for name, value in distances.items())}",
        )
    held_out = found["reencoding"]["held_out"]["all"]
    summary = (
        f"{found['num_texts']} texts come back; {held_out['equal_share']:.4%} of the units are "
        f"those of the ids; logits differ by {worst:.2g} of their size, {TOLERANCE} at most"
    )
    return {
        "logit_distances": {name: round(value, 6) for name, value in distances.items()},
        "logit_tolerance": TOLERANCE,
        "summary": summary,
    }


def _check_rows(model: "PreTrainedModel", base_size: int, reference: Reference) -> int:
    """Compare the rows of latents in both matrices; return how many rows there are."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    pairs = {"input": (embedding, reference.input_rows), "output": (head, reference.output_rows)}
    for side, (module, trained) in pairs.items():
        rows = module.weight[base_size : base_size + len(trained)]
        if not torch.equal(rows, trained.to(rows.dtype)):
            raise _failed(f"have the trained {side} rows of latents", "others")
    return min(len(module.weight) for module, _ in pairs.values())


def logit_distances(found: Tensor, expected: Tensor, base_size: int) -> dict[str, float]:
    """Return how far logits (P R U) are apart, in root mean squares of those expected."""
    scale = float((expected - expected.mean(-1, keepdim=True)).square().mean().sqrt())
    squares = (found - expected).square()
    distances = {"base": float(squares[..., :base_size].mean().sqrt()) / scale}
    if expected.shape[-1] > base_size:
        distances["latents"] = (
            float(squares[..., base_size:].flatten(0, 1).mean(0).amax().sqrt()) / scale
        )
    return distances


def _failed(rule: str, found: str) -> SettingError:
    return SettingError(
        f"an export must {rule}, got {found}. Nothing was written. Export again; if it fails "
        "again, the memory or the disk is damaged, or these versions of the libraries do not fit "
        "together."
    )
