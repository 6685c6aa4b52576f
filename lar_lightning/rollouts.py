"""Rolling out a policy on tasks, into trajectory files that grow episode by episode."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from lar_lightning.base_models import load_tokenizer, model_fingerprint
from lar_lightning.benchmarks import load_benchmark
from lar_lightning.benchmarks.benchmark import Task, split_tasks
from lar_lightning.errors import SettingError
from lar_lightning.policies import Policy, Request, Sampling, open_policy
from lar_lightning.settings import RolloutSettings
from lar_lightning.tokenizer import render_chat
from lar_lightning.trajectories import ACTION, Span, Trajectory, TrajectoryFile, read_trajectories

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One trajectory that is wanted."""

    task: Task
    sample: int
    temperature: float

    @property
    def trajectory_id(self) -> str:
        """Name of the episode in its file."""
        return f"{self.task.task_id}@{self.temperature:g}#{self.sample}"

    @property
    def seed(self) -> int:
        """Seed of its own, the same in every run."""
        return int.from_bytes(sha256(self.trajectory_id.encode()).digest()[:4], "big") >> 1


def split_benchmark(benchmark: str, settings: RolloutSettings) -> tuple[list[Task], list[Task]]:
    """Return training and held-out tasks of a benchmark."""
    return split_tasks(
        load_benchmark(benchmark).load_tasks(), settings.num_held_out, settings.split_seed
    )


def trajectory_path(run_dir: Path, split: Split) -> Path:
    """Return where a run keeps the trajectories of a split."""
    return run_dir / "trajectories" / f"{split}.jsonl"


def read_split(run_dir: Path, split: Split, settings: RolloutSettings) -> list[Trajectory]:
    """Read the trajectories of a split that the settings ask for, in the order of their names.

    The file may hold more, from a time when more were asked for.
    """
    temperatures = settings.temperatures if split == "train" else settings.held_out_temperatures
    return sorted(
        (
            trajectory
            for trajectory in read_trajectories(trajectory_path(run_dir, split))
            if int(trajectory.trajectory_id.rpartition("#")[2])
            < temperatures.count(trajectory.temperature)
        ),
        key=lambda trajectory: trajectory.trajectory_id,
    )


def roll_out(checkpoint: Path, benchmark: str, run_dir: Path, settings: RolloutSettings) -> None:
    """Bring both trajectory files of a run up to what the settings want.

    Finished episodes are reused; the engine is only opened where some are missing.

    Raises:
        SettingError: if the files were made with other settings or are corrupt, or the model has
        no chat template.
    """
    tokenizer = load_tokenizer(checkpoint)
    training, held_out = split_benchmark(benchmark, settings)
    wanted: dict[Split, list[Episode]] = {
        "train": _episodes(training, settings.temperatures),
        "held_out": _episodes(held_out, settings.held_out_temperatures),
    }
    content = file_settings(checkpoint, benchmark, settings)
    files: dict[Split, TrajectoryFile] = {
        split: TrajectoryFile(trajectory_path(run_dir, split), content) for split in wanted
    }
    missing: list[tuple[Split, Episode]] = []
    for split in SPLITS:
        episodes = wanted[split]
        done = {trajectory.trajectory_id for trajectory in _finished(files[split])}
        todo = [episode for episode in episodes if episode.trajectory_id not in done]
        num_reused = len(episodes) - len(todo)
        reused = f"{num_reused} reused from {files[split].path}"
        print(f"rollouts ({split}): {reused}, {len(todo)} to make", flush=True)
        missing.extend((split, episode) for episode in todo)
    if missing:
        _roll_out_missing(checkpoint, tokenizer, missing, files, settings)


def _episodes(tasks: Sequence[Task], temperatures: tuple[float, ...]) -> list[Episode]:
    """Number a task's samples by temperature, so that adding one changes no other episode."""
    return [
        Episode(task=task, sample=temperatures[:index].count(temperature), temperature=temperature)
        for index, temperature in enumerate(temperatures)
        for task in tasks
    ]


def file_settings(checkpoint: Path, benchmark: str, settings: RolloutSettings) -> dict[str, Any]:
    """Return what decides the content of an episode.

    How many there are and how fast they came does not.
    """
    return {
        "model_fingerprint": model_fingerprint(checkpoint),
        "benchmark": benchmark,
        "max_tokens": settings.max_tokens,
        "num_held_out": settings.num_held_out,
        "split_seed": settings.split_seed,
    }


def _finished(file: TrajectoryFile) -> list[Trajectory]:
    with file.path.open("rb") as stream:
        has_records = sum(1 for _ in zip(range(2), stream, strict=False)) > 1
    return file.read() if has_records else []


def _roll_out_missing(
    checkpoint: Path,
    tokenizer: "PreTrainedTokenizerFast",
    missing: Sequence[tuple[Split, Episode]],
    files: dict[Split, TrajectoryFile],
    settings: RolloutSettings,
) -> None:
    prompts = {
        episode.task.task_id: render_chat(tokenizer, episode.task.messages)
        for _, episode in missing
    }
    check_lengths(
        {task_id: len(ids) for task_id, (ids, _) in prompts.items()},
        settings.max_tokens,
        settings.max_model_len,
    )
    opened = open_policy(
        checkpoint,
        settings.engine,
        num_concurrent=settings.num_concurrent,
        max_model_len=settings.max_model_len,
    )
    num_tokens = 0
    with (
        opened as policy,
        tqdm(total=len(missing), desc="rollouts", unit="episode", mininterval=1.0) as progress,
    ):
        for split, trajectory in _trajectories(policy, prompts, missing, settings):
            files[split].append(trajectory)
            num_tokens += trajectory.horizon
            progress.set_postfix(tokens=num_tokens, refresh=False)
            progress.update()


def _trajectories(
    policy: Policy,
    prompts: dict[str, tuple[list[int], tuple[Span, ...]]],
    missing: Sequence[tuple[Split, Episode]],
    settings: RolloutSettings,
) -> Iterator[tuple[Split, Trajectory]]:
    sampling = Sampling(max_tokens=settings.max_tokens, with_entropies=True)
    by_id: dict[str, tuple[Split, Episode]] = {
        episode.trajectory_id: (split, episode) for split, episode in missing
    }
    requests = [
        Request(
            request_id=name,
            prompt_ids=prompts[episode.task.task_id][0],
            temperature=episode.temperature,
            seed=episode.seed,
        )
        for name, (_, episode) in by_id.items()
    ]
    for completion in policy.generate(requests, sampling):
        split, episode = by_id[completion.request_id]
        prompt_ids, spans = prompts[episode.task.task_id]
        assert completion.entropies is not None
        entropies = np.concatenate(
            [np.full(len(prompt_ids), np.nan, np.float32), completion.entropies]
        )
        token_ids = np.asarray([*prompt_ids, *completion.token_ids], dtype=np.int32)
        action = Span(role=ACTION, start=len(prompt_ids), end=len(token_ids))
        yield (
            split,
            Trajectory(
                trajectory_id=completion.request_id,
                task_id=episode.task.task_id,
                token_ids=token_ids,
                spans=(*spans, action),
                entropies=entropies,
                entropy_kind=policy.entropy_kind,
                temperature=episode.temperature,
                is_finished=completion.is_finished,
            ),
        )


def check_lengths(prompt_lengths: dict[str, int], max_tokens: int, max_model_len: int) -> None:
    """Refuse, before the engine works, prompts that leave no room for the action."""
    task_id = max(prompt_lengths, key=prompt_lengths.__getitem__)
    needed = prompt_lengths[task_id] + max_tokens
    if needed > max_model_len:
        raise SettingError(
            f"`max_model_len` must hold the longest prompt and its action, got {max_model_len} "
            f"for {needed} tokens "
            f"({task_id}). Raise it, or lower `max_tokens`."
        )
