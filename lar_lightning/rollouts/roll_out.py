"""Rolling out a policy on tasks, into trajectory files that grow episode by episode."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from lar_lightning import benchmarks
from lar_lightning.agents.agent import TurnAgent
from lar_lightning.agents.play import Limits, Played, Player, Scheduler
from lar_lightning.artefacts import Settings
from lar_lightning.base_models import load_tokenizer, model_fingerprint
from lar_lightning.benchmarks import Benchmark, Task
from lar_lightning.errors import SettingError
from lar_lightning.policies import open_policy
from lar_lightning.rollouts.shards import WHOLE, Shard, writing
from lar_lightning.run_folder import SPLITS, Split, trajectory_path
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import RolloutSettings
from lar_lightning.tokenizer import render_chat
from lar_lightning.trajectories import (
    ACTION,
    Trajectory,
    TrajectoryFile,
    check_settings,
    finished_trajectories,
    read_trajectories,
    trajectory_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
    training, held_out = benchmarks.split_benchmark(
        benchmarks.load_benchmark(benchmark), settings.num_held_out, settings.split_seed
    )
    return training[: settings.num_training], held_out


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


def roll_out(
    checkpoint: Path,
    benchmark: str,
    run_dir: Path,
    settings: RolloutSettings,
    shard: Shard = WHOLE,
) -> None:
    """Bring both trajectory files of a run up to what the settings want, or a shard of them.

    Finished episodes are reused, whichever shard of whichever number made them; the engine is only
    opened where some are missing.

    Raises:
        SettingError: if the files were made with other settings or are corrupt, the model has no
        chat template, or another process is at work on the same tasks.
    """
    load_tokenizer(checkpoint)  # refuses a model without a chat template before files are made
    training, held_out = split_benchmark(benchmark, settings)
    wanted: dict[Split, list[Episode]] = {
        "train": _episodes(shard.part_of(training), settings.temperatures),
        "held_out": _episodes(shard.part_of(held_out), settings.held_out_temperatures),
    }
    content = file_settings(checkpoint, benchmark, settings)
    with writing(run_dir / "trajectories", shard):
        files: dict[Split, TrajectoryFile] = {}
        missing: list[tuple[Split, Episode]] = []
        for split in SPLITS:
            path = trajectory_path(run_dir, split)
            todo = _unfinished(wanted[split], path, shard, content)
            if todo:
                files[split] = TrajectoryFile(shard.path_of(path), content)
            reused = f"{len(wanted[split]) - len(todo)} reused from {path}"
            print(f"rollouts ({split}{shard.label}): {reused}, {len(todo)} to make", flush=True)
            missing.extend((split, episode) for episode in todo)
        if missing:
            _roll_out_missing(
                checkpoint, benchmarks.load_benchmark(benchmark), missing, files, settings
            )


def _unfinished(
    episodes: Sequence[Episode], path: Path, shard: Shard, content: Settings
) -> list[Episode]:
    present = trajectory_files(path)
    for file in present:
        if shard.owns(file, path):
            TrajectoryFile(file, content)  # drops a torn last line
        else:
            check_settings(file, content)
    done = {trajectory.trajectory_id for trajectory in finished_trajectories(present)}
    return [episode for episode in episodes if episode.trajectory_id not in done]


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
        "benchmark": benchmarks.benchmark_identity(benchmark),
        # Files from before there were styles are direct.
        **({} if settings.style == "direct" else {"style": settings.style}),
        "max_tokens": settings.max_tokens,
        "num_held_out": settings.num_held_out,
        "split_seed": settings.split_seed,
    }


def _roll_out_missing(
    checkpoint: Path,
    benchmark: Benchmark,
    missing: Sequence[tuple[Split, Episode]],
    files: dict[Split, TrajectoryFile],
    settings: RolloutSettings,
) -> None:
    tokenizer = load_tokenizer(checkpoint)
    agent = TurnAgent(style=settings.style)
    if settings.style not in benchmark.styles:
        raise SettingError(
            f"`rollouts.style` must be one of {', '.join(benchmark.styles)} for {benchmark.name}, "
            f"got {settings.style!r}. Choose one of these, or give the benchmark what the style "
            "needs (TriviaQA has `react` with a `corpus` or a `retriever`)."
        )
    check_lengths(agent, benchmark, [episode.task for _, episode in missing], tokenizer, settings)
    by_key: dict[str, tuple[Split, Episode]] = {
        episode.trajectory_id: (split, episode) for split, episode in missing
    }
    players = [
        Player(key=key, task=episode.task, temperature=episode.temperature, seed=episode.seed)
        for key, (_, episode) in by_key.items()
    ]
    limits = Limits(
        max_tokens=settings.max_tokens,
        max_model_len=settings.max_model_len,
        num_concurrent=settings.num_concurrent,
    )
    opened = open_policy(
        checkpoint,
        settings.engine,
        num_concurrent=settings.num_concurrent,
        max_model_len=settings.max_model_len,
        parallel=settings,
    )
    vocabulary = LatentVocabulary([], base_size=len(tokenizer))
    num_tokens = num_failed = 0
    without_action: list[str] = []
    with (
        opened as policy,
        tqdm(total=len(missing), desc="rollouts", unit="episode", mininterval=1.0) as progress,
    ):
        scheduler = Scheduler(
            agent,
            benchmark,
            policy,
            tokenizer,
            vocabulary,
            limits,
            with_entropies=True,
            with_scores=False,
        )
        for played in scheduler.play(players):
            split, episode = by_key[played.key]
            trajectory = trajectory_of(played, episode, policy.entropy_kind, tokenizer)
            if trajectory is None:
                without_action.append(f"{episode.task.task_id}: {played.episode.failure}")
            else:
                files[split].append(trajectory)
                num_tokens += trajectory.horizon
            num_failed += bool(played.episode.failure)
            progress.set_postfix(tokens=num_tokens, failed=num_failed, refresh=False)
            progress.update()
    if without_action:
        print(
            f"rollouts: {len(without_action)} episodes wrote nothing and are left out, the first "
            f"is {without_action[0]}; run the verb again to try them anew",
            flush=True,
        )


def trajectory_of(
    played: Played,
    episode: Episode,
    entropy_kind: str,
    tokenizer: "PreTrainedTokenizerFast",
) -> Trajectory | None:
    """Return what was read and written in a played episode, up to its last action.

    None where no action was written.
    """
    conversation = played.conversation
    if conversation is None or all(span.role != ACTION for span in conversation.spans):
        return None
    spans = list(conversation.spans)
    while spans[-1].role != ACTION:  # an observation that nobody answered
        spans.pop()
    end = spans[-1].end
    token_ids = np.asarray(conversation.ids[:end], dtype=np.int32)
    return Trajectory(
        trajectory_id=played.key,
        task_id=episode.task.task_id,
        token_ids=token_ids,
        spans=tuple(spans),
        entropies=np.asarray(conversation.entropies[:end], dtype=np.float32),
        entropy_kind=entropy_kind,
        temperature=episode.temperature,
        # Behind a stop the policy could have gone on: only its own turn end closes an action.
        is_finished=int(token_ids[-1]) in tokenizer.all_special_ids,
    )


def check_lengths(
    agent: TurnAgent,
    benchmark: Benchmark,
    tasks: Sequence[Task],
    tokenizer: "PreTrainedTokenizerFast",
    settings: RolloutSettings,
) -> None:
    """Refuse, before the engine works, prompts that leave no room for the first action."""
    style = agent.style_for(benchmark)
    lengths = {
        task.task_id: len(render_chat(tokenizer, benchmark.messages(task, style))[0])
        for task in tasks
    }
    task_id = max(lengths, key=lengths.__getitem__)
    needed = lengths[task_id] + settings.max_tokens
    if needed > settings.max_model_len:
        raise SettingError(
            "`max_model_len` must hold the longest prompt and its action, got "
            f"{settings.max_model_len} for {needed} tokens ({task_id}). Raise it, or lower "
            "`max_tokens`."
        )
