"""What the benchmarks that ask for Python code share: options, sources, and the world.

In the styles `direct` and `cot` the whole response is the answer. In `react` the policy may run
code in the sandbox before it answers.
"""

import gzip
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lar_lightning.benchmarks.benchmark import (
    STYLES,
    Environment,
    Observation,
    Outcome,
    Style,
    Task,
)
from lar_lightning.benchmarks.python.answers import (
    extract_code,
    extract_program,
    read_action,
    remove_thoughts,
)
from lar_lightning.benchmarks.python.check import Check, run_check
from lar_lightning.benchmarks.python.prompts import EXPECTED, MAX_TURNS, write_prompt
from lar_lightning.benchmarks.sandbox import SandboxLimits, run_python
from lar_lightning.errors import SettingError

__all__ = ["MAX_OUTPUT_CHARACTERS", "CodeBenchmark", "CodeEnvironment", "extract_code"]

MAX_OUTPUT_CHARACTERS = 2000

Records = Iterator[tuple[str, dict[str, Any]]]
"""Records, each with its place in words."""


class CodeBenchmark(ABC):
    """The part of a benchmark of Python problems that does not depend on which."""

    name = ""
    styles: tuple[Style, ...] = STYLES
    markers: tuple[str, ...] = ("```python", "<execute>", "<answer>")
    wanted = "function"
    """What the answer is called in prompts."""
    hub: tuple[str, ...] = ()
    """Dataset on the Hugging Face hub, with its configuration where it has several."""
    hub_splits: tuple[str, ...] = ("test",)

    def __init__(
        self,
        path: str | Path = "",
        timeout: str | float = "",
        limits: SandboxLimits | None = None,
    ) -> None:
        """Set where the problems come from and what a solution may use.

        Args:
            path: A jsonl or jsonl.gz file, or `hub` for the dataset on the Hugging Face hub.
            timeout: Seconds for one check or one run of code; default 5.
            limits: All limits of the sandbox, in place of `timeout`.
        """
        if limits is not None and not isinstance(limits, SandboxLimits):
            raise SettingError(f"`limits` must be SandboxLimits, got {limits!r}. Use `timeout`.")
        self.path = path
        self.limits = limits or _limits_of(timeout)

    @abstractmethod
    def load_tasks(self) -> list[Task]:
        """Return the problems in the order of their source."""

    @abstractmethod
    def make_check(self, task: Task, answer: str) -> Check:
        """Return what judges an answer: what the policy wrote, but for its thoughts and tags."""

    def messages(self, task: Task, style: Style) -> list[dict[str, str]]:
        """Return one user message: the request, how to answer, the problem."""
        seconds = self.limits.wall_seconds
        content = write_prompt(task.question, style, self.wanted, seconds)
        return [{"role": "user", "content": content}]

    def stops(self, style: Style) -> tuple[str, ...]:
        """Return the tags that end an action of `react`; the other styles have none."""
        return ("</execute>", "</answer>") if style == "react" else ()

    def max_turns(self, style: Style) -> int:
        """Return how many actions an episode may have."""
        return MAX_TURNS if style == "react" else 1

    def open(self, task: Task, style: Style) -> Environment:
        """Make the environment of one episode."""
        return CodeEnvironment(self, task, style)

    def score(self, task: Task, answer: str) -> Outcome:
        """Run the official test on an answer."""
        if extract_code(answer).strip():
            is_success, detail = run_check(self.make_check(task, answer), self.limits)
        else:
            is_success, detail = False, "no code in the answer"
        return Outcome(task_id=task.task_id, is_success=is_success, detail=detail)

    def records(self) -> Records:
        """Yield the records of `path`."""
        return _read_hub(self.hub, self.hub_splits) if self.path == "hub" else self._read_file()

    def _read_file(self) -> Records:
        path = Path(self.path)
        if not path.is_file():
            raise SettingError(
                f"`path` must be a jsonl or jsonl.gz file, got {str(self.path)!r}, which is no "
                f"file. Name it as `{self.name}?path=FILE`, or read {self.hub[0]} with "
                f"`{self.name}?path=hub`."
            )
        number = 0
        try:
            with (gzip.open if path.suffix == ".gz" else open)(
                path, "rt", encoding="utf-8"
            ) as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path}:{number}", dict(json.loads(line))
        except (ValueError, TypeError, EOFError, OSError) as error:
            raise SettingError(
                f"`path` must be a jsonl or jsonl.gz file with an object in each line, got "
                f"{path}:{number or 1} ({error}). Get the file again."
            ) from error


class CodeEnvironment:
    """One problem: an interpreter to try code in, and the official test at the end."""

    def __init__(self, benchmark: CodeBenchmark, task: Task, style: Style) -> None:
        """Begin an episode."""
        self.benchmark = benchmark
        self.task = task
        self.style = style
        self.num_turns = 0
        self.answer: str | None = None

    def step(self, action: str) -> Observation:
        """Take the action as the answer, or in `react` do what it says."""
        self.num_turns += 1
        if self.style != "react":
            self.answer = remove_thoughts(action)
            return Observation(text="", is_over=True)
        act = read_action(action)
        if act.kind == "answer":
            self.answer = act.content
            return Observation(text="", is_over=True)
        if act.kind == "execute":
            text = run_and_show(extract_program(act.content), self.benchmark.limits)
        else:
            text = f"Your turn could not be used. {act.content} {EXPECTED}"
        if self.num_turns == MAX_TURNS - 1:
            text += "\n\nYour next turn is the last: write your solution in <answer>."
        return Observation(text=text)

    def outcome(self) -> Outcome:
        """Score the answer."""
        if self.answer is None:
            detail = f"no answer in {self.num_turns} turns"
            return Outcome(task_id=self.task.task_id, is_success=False, detail=detail)
        return self.benchmark.score(self.task, self.answer)


def run_and_show(program: str, limits: SandboxLimits) -> str:
    """Run a program in the sandbox and return what the policy is shown of it."""
    result = run_python(program, limits)
    # The sandbox's folder has a random name; the same code is to be answered by the same text.
    output = re.sub(r"(?:/[^/\s\"']+)*/sandbox-\w+/work(?:/\.\./)?", "", result.output)
    shown = _shorten(output.strip("\n"))
    text = f"Output:\n{shown}" if shown else "There was no output. Print what you want to see."
    if result.timed_out:
        return f"{text}\n\nThe code was stopped after {limits.wall_seconds:g} seconds."
    if result.returncode < 0:
        return f"{text}\n\nThe code was killed by signal {-result.returncode}."
    return text


def _shorten(text: str) -> str:
    """Keep both ends of a long output: the last line of a traceback says most."""
    num_cut = len(text) - MAX_OUTPUT_CHARACTERS
    if num_cut <= 0:
        return text
    half = MAX_OUTPUT_CHARACTERS // 2
    return f"{text[:half]}\n... ({num_cut} characters left out) ...\n{text[-half:]}"


def _limits_of(timeout: str | float) -> SandboxLimits:
    if timeout == "":
        return SandboxLimits()
    try:
        limits = SandboxLimits(wall_seconds=float(timeout), cpu_seconds=float(timeout))
        if limits.wall_seconds < 3600:
            return limits
    except ValueError:
        pass
    raise SettingError(
        f"`timeout` must be a number of seconds above 0 and below 3600, got {timeout!r}. Leave it "
        f"out for the default of {SandboxLimits.wall_seconds:g}."
    )


def _read_hub(name: tuple[str, ...], splits: tuple[str, ...]) -> Records:
    import datasets

    for split in splits:
        try:
            rows = datasets.load_dataset(*name, split=split, streaming=True)
            for index, row in enumerate(rows):
                yield f"{name[0]}, {split}, record {index}", dict(row)
        except (OSError, ValueError) as error:
            raise SettingError(
                f"`path` 'hub' must reach the dataset {name[0]!r} on the Hugging Face hub, got: "
                f"{error}. Or download it and set `path` to a jsonl file."
            ) from error
