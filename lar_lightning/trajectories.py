"""Episodes of an agent as token ids with roles and entropies, and the file that keeps them.

A `Trajectory` is rendered once by the policy's own chat template. Every token has a role; the
assistant's tokens are the *action tokens*, whose number is the effective horizon H_eff (paper
3.1). The file holds one JSON object a line after a header with the settings that made it; records
are only ever appended, so a killed run loses no finished episode.

Processes that share the work write a file each, `train.shard-0-of-4.jsonl` beside `train.jsonl`.
Whoever reads `train.jsonl` reads all of them as one: there is no merging that could be cut short.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lar_lightning.artefacts import Settings, differences, explained_disk_errors, replacing
from lar_lightning.errors import SettingError

SCHEMA = 1
ACTION = "assistant"
"""Role of the tokens that the policy itself decides."""
NO_ENTROPY = "none"
"""Entropy kind of trajectories whose tokens no policy has scored."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive tokens of one role: positions `start` (inclusive) to `end` (exclusive)."""

    role: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """One episode; T is its number of tokens."""

    trajectory_id: str
    """Unique in its file, e.g. `HumanEval/3@1#2` for the third sample at temperature 1."""
    task_id: str
    """Support is counted over these: several samples of one task are one witness."""
    token_ids: Int[np.ndarray, " T"]
    """Base tokens, as the policy read and wrote them."""
    spans: tuple[Span, ...]
    """Cover 0..T without gap or overlap."""
    entropies: Float[np.ndarray, " T"]
    """Nats of the policy's next-token distribution at each action token; NaN at all others, and
    everywhere where `entropy_kind` is `none`."""
    entropy_kind: str
    """How the entropies were found: `exact`, `upper bound from top-20`; `none`: they were not."""
    temperature: float | None
    """At which the policy was sampled; 0 is greedy, None is not known."""
    is_finished: bool
    """False where the token limit cut the last action."""

    def __post_init__(self) -> None:
        edges = [0, *(span.end for span in self.spans)]
        starts = [span.start for span in self.spans]
        if starts != edges[:-1] or edges[-1] != len(self.token_ids) or not len(self.token_ids):
            raise ValueError(
                f"spans of {self.trajectory_id} must cover its {len(self.token_ids)} tokens, got "
                f"{self.spans}."
            )
        if len(self.entropies) != len(self.token_ids):
            raise ValueError(
                f"entropies of {self.trajectory_id} must be one a token, got {len(self.entropies)}."
            )

    @property
    def action_spans(self) -> tuple[Span, ...]:
        """The spans that the policy wrote."""
        return tuple(span for span in self.spans if span.role == ACTION)

    @property
    def horizon(self) -> int:
        """Effective horizon H_eff: the number of action tokens."""
        return sum(span.end - span.start for span in self.action_spans)


def fitted(trajectory: Trajectory, max_tokens: int, *, is_cut: bool) -> Trajectory | None:
    """Return what fits into `max_tokens`: all, or up to an action's end if `is_cut`, or None."""
    if len(trajectory.token_ids) <= max_tokens:
        return trajectory
    ends = [span.end for span in trajectory.action_spans if span.end <= max_tokens]
    if not is_cut or not ends:
        return None
    return replace(
        trajectory,
        token_ids=trajectory.token_ids[: ends[-1]],
        entropies=trajectory.entropies[: ends[-1]],
        spans=tuple(span for span in trajectory.spans if span.end <= ends[-1]),
        is_finished=True,  # what the limit had cut is behind
    )


def to_record(trajectory: Trajectory) -> dict[str, Any]:
    """Return the JSON object of a trajectory.

    Entropies are kept for action tokens only, to 1e-4 nats; null where there are none.
    """
    entropies = None
    if trajectory.entropy_kind != NO_ENTROPY:
        entropies = [
            [round(float(value), 4) for value in trajectory.entropies[span.start : span.end]]
            for span in trajectory.action_spans
        ]
    return {
        "trajectory_id": trajectory.trajectory_id,
        "task_id": trajectory.task_id,
        "token_ids": [int(token) for token in trajectory.token_ids],
        "spans": [[span.role, span.start, span.end] for span in trajectory.spans],
        "entropies": entropies,
        "entropy_kind": trajectory.entropy_kind,
        "temperature": trajectory.temperature,
        "is_finished": trajectory.is_finished,
    }


def from_record(record: dict[str, Any]) -> Trajectory:
    """Read what `to_record` made.

    Raises:
        KeyError, TypeError, ValueError: if the object is not such a record.
    """
    spans = tuple(Span(role=role, start=start, end=end) for role, start, end in record["spans"])
    entropies = np.full(len(record["token_ids"]), np.nan, dtype=np.float32)
    action_spans = [span for span in spans if span.role == ACTION]
    is_scored = record["entropy_kind"] != NO_ENTROPY
    for span, values in zip(action_spans, record["entropies"], strict=True) if is_scored else ():
        entropies[span.start : span.end] = values
        if np.isnan(entropies[span.start : span.end]).any():
            raise ValueError(
                f"entropies must be numbers where entropy_kind is {record['entropy_kind']!r}, "
                "got NaN"
            )
    return Trajectory(
        trajectory_id=record["trajectory_id"],
        task_id=record["task_id"],
        token_ids=np.asarray(record["token_ids"], dtype=np.int32),
        spans=spans,
        entropies=entropies,
        entropy_kind=record["entropy_kind"],
        temperature=record["temperature"],
        is_finished=record["is_finished"],
    )


class TrajectoryFile:
    """Append-only JSONL file of trajectories under one set of settings."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """Open or create the file.

        Raises:
            SettingError: if the file was made with other settings, or is corrupt.
        """
        self.path = path
        self.settings = dict(settings)
        if path.exists():
            check_settings(path, self.settings)
            _drop_torn_line(path)
        else:
            with replacing(path) as temporary:
                temporary.write_text(
                    json.dumps({"schema": SCHEMA, "settings": self.settings}) + "\n",
                    encoding="utf-8",
                )

    def append(self, trajectory: Trajectory) -> None:
        """Add one trajectory and hand it to the operating system at once."""
        line = json.dumps(to_record(trajectory), ensure_ascii=False, separators=(",", ":")) + "\n"
        size = self.path.stat().st_size
        with explained_disk_errors(self.path), self.path.open("ab", buffering=0) as file:
            try:
                written = file.write(line.encode())
                if written != len(line.encode()):
                    raise OSError(28, os.strerror(28))
            except OSError:
                os.truncate(self.path, size)  # half a record would read as a torn line for ever
                raise

    def read(self) -> list[Trajectory]:
        """Return all trajectories, in the order of the file."""
        return read_trajectories(self.path)

    def finished(self) -> list[Trajectory]:
        """Return all trajectories, also where there is none yet."""
        return list(_records(self.path))


def read_settings(path: Path) -> Settings:
    """Return the settings in a trajectory file's header."""
    with _explained_read(path), path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
    try:
        header = json.loads(first)
        if not first.endswith("\n"):
            raise ValueError("the header is torn")
        if header["schema"] != SCHEMA:
            raise SettingError(
                f"{path} must have schema {SCHEMA}, got {header['schema']!r}. Roll out anew."
            )
        return dict(header["settings"])
    except SettingError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{path} must be a trajectory file whose first line is its header, got {first[:60]!r}. "
            "Remove it to roll out anew, or give the right file."
        ) from error


def check_settings(path: Path, settings: Settings) -> None:
    """Refuse a trajectory file that was made with other settings."""
    changed = differences(read_settings(path), settings)
    if changed:
        raise SettingError(
            f"`run_dir` must hold trajectories of the same settings, but {path} was made "
            f"with others ({changed}). "
            "Choose another `run_dir`, restore the settings, or remove the file."
        )


def shard_path(path: Path, index: int, count: int) -> Path:
    """Return where one of `count` processes keeps its part of the trajectories of `path`."""
    return path.with_name(f"{path.stem}.shard-{index}-of-{count}{path.suffix}")


def trajectory_files(path: Path) -> list[Path]:
    """Return the files that hold the trajectories of `path`: itself and its shards, if there."""
    name = re.compile(rf"{re.escape(path.stem)}\.shard-(\d+)-of-(\d+){re.escape(path.suffix)}")
    found = [(name.fullmatch(file.name), file) for file in path.parent.glob(f"{path.stem}.shard-*")]
    shards = sorted((int(match[2]), int(match[1]), file) for match, file in found if match)
    return [*([path] if path.exists() else []), *(file for *_, file in shards)]


def read_trajectories(path: Path) -> list[Trajectory]:
    """Read a trajectory file and its shards as one.

    A torn last line is dropped with a warning; of two episodes of one name the first counts.

    Raises:
        SettingError: if there is no such file, no trajectory in it, a line that is no trajectory,
        or a shard that was made with other settings than the rest.
    """
    files = trajectory_files(path)
    if not files:
        raise SettingError(
            f"`run_dir` must hold trajectories, but there is no {path}. Run the verb `rollout` or "
            "`import` first."
        )
    trajectories = finished_trajectories(files)
    if not trajectories:
        raise SettingError(
            f"{path} must hold at least one trajectory, got none. Run the verb `rollout` or "
            "`import` again."
        )
    return trajectories


def finished_trajectories(files: Sequence[Path]) -> list[Trajectory]:
    """Return what is in files of the same settings; there may be nothing yet."""
    found: dict[str, Trajectory] = {}
    for file in files:
        check_settings(file, read_settings(files[0]))
        for trajectory in _records(file):
            found.setdefault(trajectory.trajectory_id, trajectory)
    return list(found.values())


@contextmanager
def _explained_read(path: Path) -> Iterator[None]:
    """Name the file that a disk does not give back."""
    try:
        yield
    except OSError as error:
        raise SettingError(
            f"{path} must be readable, got {error.strerror or error}. Mend that, or move the file "
            "away and run the verb `rollout` again: only what it held is made anew."
        ) from error


def _records(path: Path) -> Iterator[Trajectory]:
    with _explained_read(path):
        lines = path.read_bytes().split(b"\n")
    is_torn = lines[-1] != b""
    for number, line in enumerate(lines[1:-1], start=2):
        try:
            yield from_record(json.loads(line))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise SettingError(
                f"{path} must hold one trajectory a line, got something else in line {number} "
                f"({error}). "
                "Remove that line, or the file, and run the verb `rollout` again: only what is "
                "missing is made anew."
            ) from error
    if is_torn:
        warnings.warn(
            f"{path}: the last line is torn (a run was killed while writing) and is left out.",
            stacklevel=2,
        )


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete != len(content):
        warnings.warn(
            f"{path}: dropped a torn last line; that episode is rolled out again.", stacklevel=3
        )
        os.truncate(path, complete)


def summary_of(trajectories: Sequence[Trajectory]) -> str:
    """Return one line for people.

    Episodes, tasks, action tokens and how the entropies were found.
    """
    kinds = " and ".join(sorted({trajectory.entropy_kind for trajectory in trajectories}))
    num_tasks = len({trajectory.task_id for trajectory in trajectories})
    num_tokens = sum(trajectory.horizon for trajectory in trajectories)
    counts = f"{len(trajectories)} trajectories of {num_tasks} tasks, {num_tokens:,} action tokens"
    return f"{counts}, entropy: {kinds}"
