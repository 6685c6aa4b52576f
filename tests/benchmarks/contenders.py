"""Trainers that take one optimizer step on the same trajectories, each in a process of its own.

`python -m tests.benchmarks.contenders NAME ...` loads one of them and takes a step for each line on
its standard input; see `tests.benchmarks.train`. All have the base weights in bf16, adapters of the
same rank on all linear layers in fp32 under bf16 autocast, and torch's AdamW. Peers read the
expanded text on both sides, at once and on its own positions only; their loss is the forward KL
over the base vocabulary at action tokens.

- lar_rows, lar_lora: ours, on the latent text and its expansion; lar_rows_cached, lar_lora_cached:
  the teacher's hidden states come from disk, where the first round has left them;
  lar_lora_checkpointed: with activation checkpointing.
- plain: teacher and student loaded, logits of all positions, fp32 softmax.
- trl_gkd: TRL's GKDTrainer without generation (`lmbda` 0), otherwise as it ships.
- trl: TRL's DistillationTrainer, fed with the stored completions where it would generate;
  trl_plain: the same without its gradient checkpointing.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lar_lightning.alignment import AlignedTrajectory, align
from lar_lightning.batches import DistillationBatch, collate
from lar_lightning.distributed.sharding import decoder_layers
from lar_lightning.estimates.backbones import Backbone
from lar_lightning.estimates.memory import memory_of
from lar_lightning.estimates.speed import flops_of
from lar_lightning.loading import TrajectoryLoader
from lar_lightning.models.recomputation import recompute
from lar_lightning.models.student import Student
from lar_lightning.module import LatentActionModule
from lar_lightning.run_folder import trajectory_path, vocabulary_path
from lar_lightning.segments import LatentVocabulary
from lar_lightning.training.teacher_cache import TeacherCache
from lar_lightning.trajectories import read_trajectories
from tests.benchmarks.meter import Meter, reports_alone
from tests.measured_steps import workload_of

RANK = 16
Pairs = Sequence[Sequence[AlignedTrajectory]]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What all contenders start from."""

    load: Callable[[], Any]
    """Loads the base model once more."""
    tokenizer: Path
    vocabulary: LatentVocabulary
    pairs: Pairs
    """By batch."""
    meter: Meter
    device: str
    rows_per_chunk: int
    backbone: Backbone | None = None
    """For estimates."""

    def batches(self) -> Iterator[DistillationBatch]:
        """Go round and round the batches."""
        device = torch.device(self.device)
        return cycle([collate(batch).to(device) for batch in self.pairs])


def pairs_of(run_dir: Path, batch_size: int, num_batches: int, is_grouped: bool) -> Pairs:
    """Return the first batches of a run's first epoch."""
    vocabulary = LatentVocabulary.load(vocabulary_path(run_dir))
    trajectories = read_trajectories(trajectory_path(run_dir, "train"))
    aligned = [align(vocabulary, trajectory) for trajectory in trajectories]
    loader = TrajectoryLoader(aligned, batch_size=batch_size, is_grouped=is_grouped)
    batches = loader.batches_of_epoch()[:num_batches]
    return [[loader.trajectories[index] for index in batch] for batch in batches]


def lar(
    trainable: Any, parts: Parts, *, is_cached: bool = False, is_checkpointed: bool = False
) -> None:
    """Take our steps."""
    folder = tempfile.TemporaryDirectory()
    module = LatentActionModule("", Path(folder.name), rows_per_chunk=parts.rows_per_chunk)
    module.student = Student(
        parts.load(), parts.vocabulary, trainable=trainable, lora_rank=RANK
    ).to(parts.device)
    if is_checkpointed:
        recompute(decoder_layers(module.student.model))
    if is_cached:
        module.teacher_cache = TeacherCache(Path(folder.name), {})
    batches = parts.batches()
    if parts.backbone is not None:
        work = workload_of(
            module.student,
            next(batches),
            trainable=trainable,
            rows_per_chunk=parts.rows_per_chunk,
            lora_rank=RANK,
            is_checkpointed=is_checkpointed,
        )
        memory, flops = memory_of(parts.backbone, work), flops_of(parts.backbone, work)
        parts.meter.estimated = {"peak": memory.peak, "flops": flops}
        batches = parts.batches()
    _loop(module, lambda: module.compare(next(batches), module.distillation)[0], parts.meter)


def plain(parts: Parts) -> None:
    """Take the steps of a loop as one would write it."""
    teacher, student = parts.load(), _with_adapters(parts.load())
    batches = parts.batches()

    def loss() -> Tensor:
        batch = next(batches)
        inputs = {"input_ids": batch.teacher_ids, "attention_mask": batch.teacher_mask}
        with torch.no_grad():
            wanted = teacher(**inputs).logits.float().log_softmax(-1)
        with torch.autocast(parts.device, dtype=torch.bfloat16):
            logits = student(**inputs).logits
        nats = functional.kl_div(
            logits.float().log_softmax(-1), wanted, reduction="none", log_target=True
        ).sum(-1)
        return nats[_is_action(batch)].mean()

    _loop(student, loss, parts.meter)


def trl_gkd(parts: Parts) -> None:
    """Take the steps of TRL's GKDTrainer."""
    from trl.experimental.gkd import (  # pyright: ignore[reportMissingImports]
        GKDConfig,
        GKDTrainer,
    )

    inputs = map(_labelled, parts.batches())
    options = {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0}
    trainer = GKDTrainer(
        args=GKDConfig(**_trl_options(parts), **options),
        data_collator=lambda _: next(inputs),
        **_trl_parts(parts),
    )
    trainer.train()


def trl(parts: Parts, *, is_checkpointed: bool = True) -> None:
    """Take the steps of TRL's DistillationTrainer."""
    from trl import (  # pyright: ignore[reportMissingImports]
        DistillationConfig,
        DistillationTrainer,
    )

    batches = cycle([_completions(batch, parts.device) for batch in parts.pairs])

    class Fed(DistillationTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
            return next(batches)

    options = {"beta": 0.0, "temperature": 1.0, "gradient_checkpointing": is_checkpointed}
    trainer = Fed(
        args=DistillationConfig(**_trl_options(parts), **options),
        **_trl_parts(parts),
    )
    trainer.train()


def _loop(module: nn.Module, loss_of: Callable[[], Tensor], meter: Meter) -> None:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    while True:
        meter.begin()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.end(float(loss.detach()))


def loader_of(checkpoint: Path) -> Callable[[], Any]:
    """Return what loads a checkpoint in bf16."""
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)


def _adapters() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def _with_adapters(model: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, _adapters())


def _is_action(batch: DistillationBatch) -> Tensor:
    """Tell for each position whether its row predicts an action token."""
    length, device = batch.teacher_ids.shape[1], batch.teacher_ids.device
    first = torch.full((len(batch.teacher_ids),), length, device=device)
    first.scatter_reduce_(0, batch.teacher_rows // length, batch.teacher_rows % length, "amin")
    place = torch.arange(length, device=device)
    return (place >= first[:, None]) & (place < batch.teacher_mask.sum(1, keepdim=True) - 1)


def _labelled(batch: DistillationBatch) -> dict[str, Tensor]:
    labels = torch.full_like(batch.teacher_ids, -100)
    is_action = _is_action(batch)[:, :-1]
    labels[:, 1:] = torch.where(is_action, batch.teacher_ids[:, 1:], -100)
    return {"input_ids": batch.teacher_ids, "attention_mask": batch.teacher_mask, "labels": labels}


def _completions(batch: Sequence[AlignedTrajectory], device: str) -> dict[str, Tensor]:
    """Return prompts padded on the left and completions padded on the right."""
    firsts = [int(item.teacher_rows.min()) + 1 for item in batch]
    lefts = [item.teacher_ids[:first] for item, first in zip(batch, firsts, strict=True)]
    rights = [item.teacher_ids[first:] for item, first in zip(batch, firsts, strict=True)]
    padded = {}
    for name, parts in {"prompt": lefts, "completion": rights}.items():
        width = max(map(len, parts))
        for key in ("ids", "mask"):
            padded[f"{name}_{key}"] = torch.zeros(len(parts), width, dtype=torch.int64)
        for row, part in enumerate(parts):
            place = slice(-len(part), None) if name == "prompt" else slice(len(part))
            padded[f"{name}_ids"][row, place] = torch.from_numpy(part)
            padded[f"{name}_mask"][row, place] = 1
    padded["num_items_in_batch"] = padded["completion_mask"].sum().float()
    return {key: value.to(device) for key, value in padded.items()}


def _trl_options(parts: Parts) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": len(parts.pairs[0]),
        "max_steps": 1_000_000,
        "learning_rate": 1e-5,
        "use_cpu": parts.device == "cpu",
        "bf16": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "optim": "adamw_torch",
        "dataloader_pin_memory": False,
    }


def _trl_parts(parts: Parts) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            parts.meter.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            parts.meter.end(None)  # the trainer keeps its loss to itself

    return {
        "model": parts.load(),
        "teacher_model": parts.load(),
        "train_dataset": Dataset.from_dict({"prompt": ["a"] * 1024}),
        "processing_class": AutoTokenizer.from_pretrained(parts.tokenizer),
        "peft_config": _adapters(),
        "callbacks": [Steps()],
    }


CONTENDERS: dict[str, Callable[[Parts], None]] = {
    "lar_rows": partial(lar, "rows"),
    "lar_lora": partial(lar, "lora"),
    "lar_rows_cached": partial(lar, "rows", is_cached=True),
    "lar_lora_cached": partial(lar, "lora", is_cached=True),
    "lar_lora_checkpointed": partial(lar, "lora", is_checkpointed=True),
    "plain": plain,
    "trl_gkd": trl_gkd,
    "trl": trl,
    "trl_plain": partial(trl, is_checkpointed=False),
}


def main() -> None:
    """Run one contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("model", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("batch_size", type=int)
    parser.add_argument("num_batches", type=int)
    parser.add_argument("is_grouped", type=int)
    options = parser.parse_args()
    reports = reports_alone()
    torch.manual_seed(0)
    pairs = pairs_of(
        options.run_dir, options.batch_size, options.num_batches, bool(options.is_grouped)
    )
    parts = Parts(
        load=loader_of(options.model),
        tokenizer=options.model,
        vocabulary=LatentVocabulary.load(vocabulary_path(options.run_dir)),
        pairs=pairs,
        meter=Meter(reports, len(pairs)),
        device="cpu",
        rows_per_chunk=64,
    )
    CONTENDERS[options.name](parts)


if __name__ == "__main__":
    main()
