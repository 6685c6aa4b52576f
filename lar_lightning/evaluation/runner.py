"""One method on the tasks of a benchmark, played and scored; every finished episode is on disk.

A file holds one JSON object a line: a header with what decides the episodes, then the episodes as
they ended. A run that was killed goes on with those that are missing.
"""

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from lar_lightning.agents.agent import Agent
from lar_lightning.agents.episode import Episode, from_json, to_json
from lar_lightning.agents.play import Limits, Player, Scheduler
from lar_lightning.artefacts import explained_disk_errors, replacing
from lar_lightning.base_models import load_tokenizer, model_fingerprint
from lar_lightning.benchmarks.benchmark import Benchmark, Task
from lar_lightning.errors import SettingError
from lar_lightning.policies import Policy, Request, Sampling, generate, open_policy
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import EvaluationSettings, ParallelSettings
from lar_lightning.tokenizer import render_chat

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class MethodRun:
    """One method, once over all tasks."""

    method: str
    run: int
    wall_clock_seconds: float
    """First request to last outcome, engine loaded; summed over sittings, if it was stopped."""
    episodes: tuple[Episode, ...]
    """In the order of their task ids."""


class Engine:
    """The engine that is open at the moment: one at a time, opened when it is needed."""

    def __init__(self, settings: EvaluationSettings) -> None:
        """Open nothing yet."""
        self.settings = settings
        self.checkpoint: Path | None = None
        self.max_model_len = settings.max_model_len
        self._context: Any = None
        self._policy: Policy | None = None

    def serve(self, checkpoint: Path, max_model_len: int = 0) -> Policy:
        """Return a policy with this checkpoint; the one before is freed.

        Args:
            checkpoint: What is to be served.
            max_model_len: Units that it must have room for, where that is more than set.
        """
        is_fit = checkpoint == self.checkpoint and max_model_len <= self.max_model_len
        if self._policy is None or not is_fit:
            self.close()
            self.max_model_len = max(max_model_len, self.settings.max_model_len)
            self._context = open_policy(
                checkpoint,
                self.settings.engine,
                num_concurrent=self.settings.num_concurrent,
                max_model_len=self.max_model_len,
                parallel=self.settings,
            )
            policy: Policy = self._context.__enter__()
            self._policy, self.checkpoint = policy, checkpoint
            _warm_up(policy, checkpoint, self.settings.data_parallel_size)
            return policy
        return self._policy

    def close(self) -> None:
        """Free the engine."""
        if self._context is not None:
            context, self._context, self._policy = self._context, None, None
            context.__exit__(None, None, None)


@contextmanager
def open_engine(settings: EvaluationSettings) -> Iterator[Engine]:
    """Have an engine for a while."""
    engine = Engine(settings)
    try:
        yield engine
    finally:
        engine.close()


def _warm_up(policy: Policy, checkpoint: Path, num_engines: int) -> None:
    """Let each engine compile and allocate before the clock runs."""
    ids, _ = render_chat(load_tokenizer(checkpoint), [{"role": "user", "content": "Warm up."}])
    names = [f"warm-up {number}" for number in range(num_engines)]
    requests = [Request(request_id=name, prompt_ids=ids) for name in names]
    list(generate(policy, requests, Sampling(max_tokens=8)))


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method that is ready to be played."""

    label: str
    """Its name in tables and files."""
    agent: Agent
    checkpoint: Path
    vocabulary: LatentVocabulary | None = None
    """Of the checkpoint; None where it has none."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What is played: a benchmark with its options."""

    benchmark: Benchmark
    identity: str
    """Name and options that decide its episodes, of `benchmark_identity`."""


def evaluate_method(
    method: Method,
    course: Course,
    tasks: Sequence[Task],
    folder: Path,
    settings: EvaluationSettings,
    engine: Engine,
    num_runs: int | None = None,
) -> list[MethodRun]:
    """Play a method on all tasks, `num_runs` times (default: as the settings say).

    Episodes that are on disk with the same settings are reused.
    """
    return [
        play_run(method, run, course, tasks, folder, settings, engine)
        for run in range(num_runs or settings.num_runs)
    ]


def play_run(
    method: Method,
    run: int,
    course: Course,
    tasks: Sequence[Task],
    folder: Path,
    settings: EvaluationSettings,
    engine: Engine,
) -> MethodRun:
    """Play a method once on all tasks; what is on disk is not played again."""
    benchmark = course.benchmark
    file = EpisodeFile(
        folder / f"{method.label}-{run}.jsonl", _signature(method, course, tasks, settings)
    )
    missing = file.missing(tasks)
    name = f"{method.label} on {benchmark.name}, run {run}"
    print(
        f"evaluate ({name}): {len(tasks) - len(missing)} episodes reused, {len(missing)} to play",
        flush=True,
    )
    if missing:
        policy = engine.serve(method.checkpoint)
        tokenizer = load_tokenizer(method.checkpoint)
        vocabulary = method.vocabulary or LatentVocabulary([], base_size=len(tokenizer))
        limits = Limits(
            max_tokens=settings.max_tokens,
            max_model_len=settings.max_model_len,
            num_concurrent=settings.num_concurrent,
            environment_seconds=settings.environment_seconds,
        )
        scheduler = Scheduler(method.agent, benchmark, policy, tokenizer, vocabulary, limits)
        # Runs of one engine differ in what is decoded together, as two days in production do.
        ordered = sorted(missing, key=lambda task: task.task_id, reverse=run % 2 == 1)
        players = [Player(key=task.task_id, task=task) for task in ordered]
        file.start_clock()
        with tqdm(total=len(players), desc=name, unit="episode", mininterval=1.0) as progress:
            num_failed = 0
            for played in scheduler.play(players):
                file.append(played.episode)
                num_failed += bool(played.episode.failure)
                progress.set_postfix(failed=num_failed, refresh=False)
                progress.update()
    return file.read_run(method.label, run, tasks)


def _signature(
    method: Method, course: Course, tasks: Sequence[Task], settings: EvaluationSettings
) -> dict[str, Any]:
    """Return what decides an episode; which tasks are played does not."""
    deciding = asdict(settings)
    spread = [field.name for field in fields(ParallelSettings)]
    for name in ("num_runs", "num_concurrent", *spread):
        del deciding[name]
    vocabulary = method.vocabulary
    return {
        "agent": {"name": method.agent.name, **json.loads(json.dumps(vars(method.agent)))},
        "checkpoint": model_fingerprint(method.checkpoint),
        "latents": None if vocabulary is None else digest_of(vocabulary.segments),
        "benchmark": course.identity,
        "tasks": {task.task_id: digest_of(task.question)[:8] for task in tasks},
        "settings": deciding,
    }


def digest_of(value: Any) -> str:
    """Return a short name of a value's content."""
    return sha256(repr(value).encode()).hexdigest()[:16]


class EpisodeFile:
    """Episodes of one method, run and benchmark, one JSON object a line after a header."""

    def __init__(self, path: Path, signature: dict[str, Any]) -> None:
        """Open or create; a file made with other settings is set aside, not lost."""
        self.path = path
        self.sitting = uuid.uuid4().hex[:8]
        self.began = perf_counter()
        tasks = signature.pop("tasks")
        if path.exists():
            header = read_header(path)
            known = header.get("tasks", {})
            changed = {name for name in tasks if known.get(name, tasks[name]) != tasks[name]}
            if header.get("signature") == signature and not changed:
                _mend(path)
                return
            aside = path.with_suffix(f".{digest_of(header)[:8]}.old")
            os.replace(path, aside)
            print(f"evaluate: {path} was made with other settings; it is now {aside}", flush=True)
        with replacing(path) as temporary:
            header = {"schema": SCHEMA, "signature": signature, "tasks": tasks}
            temporary.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def start_clock(self) -> None:
        """Begin to count time: the engine is loaded."""
        self.began = perf_counter()

    def append(self, episode: Episode) -> None:
        """Add an episode and hand it to the operating system at once."""
        record = {
            "sitting": self.sitting,
            "elapsed": round(perf_counter() - self.began, 3),
            "episode": to_json(episode),
        }
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"
        with explained_disk_errors(self.path), self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line.encode(errors="replace")) != len(line.encode(errors="replace")):
                    raise OSError(28, os.strerror(28))
            except OSError:
                os.truncate(self.path, size)  # half a record would be dropped as torn
                raise

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks without an episode."""
        done = {record["episode"]["task_id"] for record in read_records(self.path)}
        return [task for task in tasks if task.task_id not in done]

    def read_run(self, method: str, run: int, tasks: Sequence[Task]) -> MethodRun:
        """Return the episodes of these tasks; all must be there."""
        return read_run(self.path, method, run, {task.task_id for task in tasks})


def read_run(path: Path, method: str, run: int, task_ids: set[str] | None = None) -> MethodRun:
    """Read an episode file, all of it or some tasks.

    Raises:
        SettingError: if a line is no episode of this version.
    """
    found: dict[str, Episode] = {}
    sittings: dict[str, float] = {}
    try:
        for record in read_records(path):
            episode = from_json(record["episode"])
            if task_ids is None or episode.task_id in task_ids:
                found[episode.task_id] = episode
                sitting = record["sitting"]
                sittings[sitting] = max(sittings.get(sitting, 0.0), record["elapsed"])
    except (KeyError, TypeError) as error:
        raise SettingError(
            f"`run_dir` must hold answers of this version in {path}, got others ({error!r}). "
            "Remove it and run the verb again."
        ) from error
    return MethodRun(
        method=method,
        run=run,
        wall_clock_seconds=round(sum(sittings.values()), 3),
        episodes=tuple(found[name] for name in sorted(found)),
    )


def read_header(path: Path) -> dict[str, Any]:
    """Return the first line of an episode file; empty where it is none."""
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            header = json.loads(file.readline())
        except ValueError:
            return {}
    return header if isinstance(header, dict) and header.get("schema") == SCHEMA else {}


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of an episode file; a torn last line is left out."""
    for line in path.read_bytes().split(b"\n")[1:-1]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SettingError(
                f"{path} must hold one JSON object a line, got {line[:60]!r}. Remove that line and "
                "run the verb again: its episode is played anew."
            ) from error
        yield record


def _mend(path: Path) -> None:
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete != len(content):
        os.truncate(path, complete)
