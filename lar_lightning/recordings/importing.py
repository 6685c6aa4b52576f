"""Bringing recordings into a run: read, split by task, rendered, and scored where that is wanted.

run_dir/trajectories/{train,held_out}.jsonl   trajectories of the policy's tokens
run_dir/trajectories/import.json              what they were made of, and what was left out

Episodes are appended one by one, so that a killed import goes on where it stopped.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lar_lightning.artefacts import differences, write_json
from lar_lightning.base_models import load_tokenizer, model_fingerprint, tokenizer_fingerprint
from lar_lightning.benchmarks.benchmark import Task, split_tasks
from lar_lightning.errors import SettingError
from lar_lightning.recordings.episode import Episode
from lar_lightning.recordings.reading import read_episodes, recorded_files
from lar_lightning.recordings.rendering import Renderer
from lar_lightning.run_folder import SPLITS, Split, trajectory_path
from lar_lightning.settings import RecordingSettings
from lar_lightning.trajectories import Trajectory, TrajectoryFile, fitted, read_trajectories


def import_recordings(checkpoint: Path, run_dir: Path, settings: RecordingSettings) -> None:
    """Bring both trajectory files of a run up to what the settings want.

    Raises:
        SettingError: if the files were made with other settings, no episode can be used, or one
        cannot be read and `is_strict` is set.
    """
    files = recorded_files(settings.paths)
    content = file_settings(checkpoint, files, settings)
    report_path = run_dir / "trajectories" / "import.json"
    if report_path.exists():
        report = json.loads(report_path.read_text(encoding="utf-8"))
        has_files = all(trajectory_path(run_dir, split).exists() for split in SPLITS)
        if has_files and not differences(report["settings"], content):
            print(f"recordings: reused {report_path.parent} ({_words(report['counts'])})")
            return
    for split in SPLITS:  # refuse other settings before any work
        if trajectory_path(run_dir, split).exists():
            TrajectoryFile(trajectory_path(run_dir, split), content)
    episodes = list(read_episodes(files, settings.format, settings.is_strict))
    held_out = held_out_tasks([episode.task_id for episode in episodes], settings)
    counts = Counter(episodes=len(episodes), tasks=len({episode.task_id for episode in episodes}))
    print(f"recordings: {_words(counts)} in {len(files)} files", flush=True)
    trajectories = _rendered(checkpoint, episodes, settings, counts)
    by_split: dict[Split, list[Trajectory]] = {
        "train": [t for t in trajectories if t.task_id not in held_out],
        "held_out": [t for t in trajectories if t.task_id in held_out],
    }
    for split, wanted in by_split.items():
        if not wanted:
            raise SettingError(
                f"`recordings.num_held_out` must leave usable episodes on both sides, got "
                f"{settings.num_held_out}, which leaves none for {split}. Give more recordings, or "
                "change it or `recordings.split_seed`."
            )
    outputs: dict[Split, TrajectoryFile] = {
        split: TrajectoryFile(trajectory_path(run_dir, split), content) for split in by_split
    }
    _write(checkpoint, by_split, outputs, settings)
    counts.update({split: len(wanted) for split, wanted in by_split.items()})
    write_json(report_path, {"settings": content, "counts": dict(counts)})
    print(f"recordings: made {report_path.parent} ({_words(counts)})", flush=True)


def read_recorded(run_dir: Path, split: Split) -> list[Trajectory]:
    """Read the imported trajectories of a split, in the order of their names."""
    trajectories = read_trajectories(trajectory_path(run_dir, split))
    return sorted(trajectories, key=lambda trajectory: trajectory.trajectory_id)


def file_settings(
    checkpoint: Path, files: Sequence[Path], settings: RecordingSettings
) -> dict[str, Any]:
    """Return what decides the content of the trajectory files; where recordings lie does not."""
    digest = sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(file.name.encode() + sha256(stream.read()).digest())
    deciding = asdict(settings)
    for name in ("paths", "tokens_per_batch", "is_strict"):
        del deciding[name]
    tokenizer = load_tokenizer(checkpoint)
    template = sha256(repr(tokenizer.chat_template).encode()).hexdigest()[:16]
    return {
        "recordings": digest.hexdigest()[:16],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": template,
        **deciding,
        **({"model": model_fingerprint(checkpoint)} if settings.entropy == "exact" else {}),
    }


def held_out_tasks(task_ids: Sequence[str], settings: RecordingSettings) -> set[str]:
    """Return the tasks that are kept from mining and training, drawn by a hash of their ids."""
    tasks = [Task(task_id=name, question="", record={}) for name in dict.fromkeys(task_ids)]
    if len(tasks) < 2:
        raise SettingError(
            f"`recordings.paths` must hold episodes of at least 2 tasks, got {len(tasks)}. Some "
            "are kept from mining to test on; give more recordings."
        )
    share = settings.num_held_out
    number = max(1, round(share * len(tasks))) if share < 1 else int(share)
    return {task.task_id for task in split_tasks(tasks, number, settings.split_seed)[1]}


def _rendered(
    checkpoint: Path, episodes: Sequence[Episode], settings: RecordingSettings, counts: Counter[str]
) -> list[Trajectory]:
    renderer = Renderer(load_tokenizer(checkpoint))
    if renderer.template.fallbacks:
        print(f"chat template: {'; '.join(renderer.template.fallbacks)}", flush=True)
    found: list[Trajectory] = []
    shortest = 0
    for episode in tqdm(episodes, desc="rendering", unit="episode", mininterval=1.0):
        trajectory = renderer.trajectory_of(episode)
        if trajectory is None:
            counts["without actions that the chat template shows"] += 1
            continue
        is_cut = settings.too_long == "truncate"
        fitting = fitted(trajectory, settings.max_model_len, is_cut=is_cut)
        if fitting is None:
            counts["too long"] += 1
            least = trajectory.action_spans[0 if settings.too_long == "truncate" else -1].end
            shortest = min(shortest or least, least)
        else:
            counts["truncated"] += fitting is not trajectory
            found.append(fitting)
    counts["actions shown otherwise in later turns"] = renderer.num_rewritten
    if not found:
        raise SettingError(
            f"`recordings.max_model_len` must hold an episode, got {settings.max_model_len} where "
            f"the shortest needs {shortest} tokens. Raise it as far as `base_model` allows."
            if shortest
            else "`recordings.paths` must hold episodes with actions of an assistant, got none "
            f"among {len(episodes)}."
        )
    return found


def _write(
    checkpoint: Path,
    by_split: dict[Split, list[Trajectory]],
    outputs: dict[Split, TrajectoryFile],
    settings: RecordingSettings,
) -> None:
    missing: dict[str, tuple[Split, Trajectory]] = {}
    for split, wanted in by_split.items():
        done = {trajectory.trajectory_id for trajectory in outputs[split].finished()}
        missing |= {t.trajectory_id: (split, t) for t in wanted if t.trajectory_id not in done}
        print(f"recordings ({split}): {len(wanted)} trajectories, {len(done)} done", flush=True)
    todo = [trajectory for _, trajectory in missing.values()]
    if settings.entropy == "exact" and todo:
        from lar_lightning.models.scoring import load_scorer, scored

        model = load_scorer(checkpoint)
        ready = scored(model, todo, tokens_per_batch=settings.tokens_per_batch)
    else:
        ready = iter(todo)
    for trajectory in ready:
        outputs[missing[trajectory.trajectory_id][0]].append(trajectory)


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)
