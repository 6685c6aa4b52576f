"""The stages of a run over its folder.

Each reuses what is on disk, makes what is missing, and says which in one line.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lar_lightning.artefacts import differences
from lar_lightning.base_models import load_tokenizer
from lar_lightning.errors import SettingError
from lar_lightning.run_folder import (
    base_checkpoint,
    checkpoint_path,
    trajectory_path,
    vocabulary_path,
)
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tokenizer import check_tokenizer, check_tokens

if TYPE_CHECKING:
    from lar_lightning.mining.equivalence import NextTokenScorer
    from lar_lightning.rollouts.shards import Shard
    from lar_lightning.run_folder import Split
    from lar_lightning.settings import MiningSettings, RecordingSettings, RolloutSettings
    from lar_lightning.trajectories import Trajectory


def ensure_rollouts(
    base_model: str,
    benchmark: str,
    run_dir: Path,
    settings: "RolloutSettings",
    shard: "Shard | None" = None,
) -> None:
    """Roll out what is missing, of all tasks or of a shard of them."""
    from lar_lightning.rollouts.roll_out import roll_out
    from lar_lightning.rollouts.shards import WHOLE

    roll_out(base_checkpoint(base_model), benchmark, run_dir, settings, shard or WHOLE)


def ensure_recordings(base_model: str, run_dir: Path, settings: "RecordingSettings") -> None:
    """Import what is missing."""
    from lar_lightning.recordings.importing import import_recordings

    import_recordings(base_checkpoint(base_model), run_dir, settings)


def read_run(
    run_dir: Path, split: "Split", source: "RolloutSettings | RecordingSettings"
) -> "list[Trajectory]":
    """Read the trajectories of a split that a run's source asks for."""
    from lar_lightning.recordings.importing import read_recorded
    from lar_lightning.rollouts.roll_out import read_split
    from lar_lightning.settings import RolloutSettings

    if isinstance(source, RolloutSettings):
        return read_split(run_dir, split, source)
    return read_recorded(run_dir, split)


def ensure_vocabulary(
    base_model: str,
    run_dir: Path,
    source: "RolloutSettings | RecordingSettings",
    settings: "MiningSettings",
) -> LatentVocabulary:
    """Mine the run's training trajectories, unless that was done with the same settings."""
    from lar_lightning.trajectories import summary_of

    trajectories = _minable(run_dir, source, settings)
    tokenizer = load_tokenizer(base_checkpoint(base_model))
    check_tokens(tokenizer, trajectories)
    wanted = {
        "mining": json.loads(json.dumps(asdict(settings), default=str)),
        "trajectories": _content_fingerprint(trajectories),
    }
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
    from lar_lightning.mining.report import (
        PAGE_NAME,
        describe,
        facts_of,
        text_report,
        write_reports,
    )

    print(f"latent vocabulary: mining {summary_of(trajectories)}", flush=True)
    with _scorer(base_model, settings) as scorer:
        mined = mine(trajectories, tokenizer, settings, scorer=scorer, is_quiet=False)
    held_out = read_run(run_dir, "held_out", source)
    description = describe(mined, trajectories, held_out, tokenizer, settings)
    write_reports(run_dir, description, title=run_dir.name)
    mined.vocabulary.provenance = {**wanted, "report": facts_of(description)}
    mined.vocabulary.save(path)
    print(text_report(description), flush=True)
    print(f"latent vocabulary: made {path}; {run_dir / PAGE_NAME} is the page about it", flush=True)
    return mined.vocabulary


def explain_text(
    base_model: str,
    run_dir: Path,
    source: "RolloutSettings | RecordingSettings",
    settings: "MiningSettings",
    text: str,
) -> list[str]:
    """Say of a text why it is a latent action of the run, or is not."""
    from lar_lightning.mining.explain import explain

    trajectories = _minable(run_dir, source, settings)
    tokenizer = load_tokenizer(base_checkpoint(base_model))
    vocabulary = LatentVocabulary.load(vocabulary_path(run_dir))
    return explain(text, trajectories, tokenizer, settings, vocabulary)


def _minable(
    run_dir: Path, source: "RolloutSettings | RecordingSettings", settings: "MiningSettings"
) -> "list[Trajectory]":
    """Read the training trajectories of a run and of those that it shares a vocabulary with."""
    from lar_lightning.trajectories import read_trajectories

    trajectories = read_run(run_dir, "train", source)
    for other in settings.also:
        trajectories += read_trajectories(trajectory_path(other, "train"))
    return trajectories


@contextmanager
def _scorer(base_model: str, settings: "MiningSettings") -> "Iterator[NextTokenScorer | None]":
    """Open the policy where mining asks it something."""
    if settings.epsilon == 0:
        yield None
        return
    from lar_lightning.models.next_token_scorer import open_scorer

    with open_scorer(base_checkpoint(base_model)) as scorer:
        yield scorer


def _content_fingerprint(trajectories: list[Any]) -> str:
    digest = sha256()
    for trajectory in trajectories:
        digest.update(trajectory.trajectory_id.encode() + trajectory.token_ids.tobytes())
    return digest.hexdigest()[:16]
