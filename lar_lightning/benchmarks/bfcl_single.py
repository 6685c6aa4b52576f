"""BFCL v4 single-turn (Patil et al. 2025): the right calls of documented functions, in one answer.

Calls are written as JSON, one on a line, as agents in production write them, and scored by the
rules of the official AST checker. Where this one departs from the official evaluation: the words of
the prompt are others, every model is asked in that format, also one with a template of its own, and
whatever stands around the calls does not spoil them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lar_lightning.benchmarks.benchmark import Environment, Outcome, Style, Task
from lar_lightning.benchmarks.one_answer import OneAnswer
from lar_lightning.benchmarks.tools.apis import find_data, read_answered
from lar_lightning.benchmarks.tools.calls import MalformedCallsError
from lar_lightning.benchmarks.tools.json_calls import BEGINNING, FORMAT, parse_json_calls
from lar_lightning.benchmarks.tools.matching import match_calls
from lar_lightning.benchmarks.tools.prompts import RENDERERS
from lar_lightning.errors import one_of

FILES = {
    "simple": "BFCL_v4_simple_python.json",
    "multiple": "BFCL_v4_multiple.json",
    "parallel": "BFCL_v4_parallel.json",
    "parallel_multiple": "BFCL_v4_parallel_multiple.json",
}
"""Category -> its file."""
INSTRUCTION = """Fulfil the request by calling functions. {thought}Answer with each call that it \
needs as a JSON object on a line of its own, and nothing else:
{form}

Functions:
{functions}

Request:
{request}"""
THOUGHT = "First think step by step between <think> and </think>. "


class BfclSingle:
    """The single-turn part of the Berkeley Function Calling Leaderboard, in Python's categories."""

    name = "bfcl_single"
    styles: tuple[Style, ...] = ("direct", "cot")
    markers: tuple[str, ...] = (BEGINNING,)

    def __init__(
        self,
        path: Path | str | None = None,
        category: str = ",".join(FILES),
        docs: str = "full",
    ) -> None:
        """Set which tasks are played and how.

        Args:
            path: Folder with the data files; default: those of the wheel `bfcl-eval`.
            category: One or more of `simple` (400 tasks: one function, one call), `multiple` (200:
                one call of several functions), `parallel` (200: several calls of one function)
                and `parallel_multiple` (200), separated by commas.
            docs: `full`, the functions' records as JSON, or `compact`, a line for each.
        """
        self.path = None if path is None else Path(path)
        self.categories = [one_of("category", each, FILES) for each in category.split(",")]
        self.render = RENDERERS[one_of("docs", docs, RENDERERS)]

    def load_tasks(self) -> list[Task]:
        """Return the tasks of the categories in file order."""
        folder = self.path or find_data()
        return [
            self._make_task(category, record, answer)
            for category in self.categories
            for record, answer in read_answered(folder, FILES[category])
        ]

    def messages(self, task: Task, style: Style) -> list[dict[str, str]]:
        """Return instruction, functions and the request in one user message."""
        content = INSTRUCTION.format(
            thought=THOUGHT if style == "cot" else "",
            form=FORMAT,
            functions=self.render(task.record["functions"]),
            request=task.question,
        )
        return [{"role": "user", "content": content}]

    def stops(self, style: Style) -> tuple[str, ...]:
        """Return no stop: how many calls there are is part of the answer."""
        return ()

    def max_turns(self, style: Style) -> int:
        """Return one: calls are not carried out."""
        return 1

    def open(self, task: Task, style: Style) -> Environment:
        """Make the environment that takes the calls."""
        return OneAnswer(task=task, score=score_calls)

    def _make_task(self, category: str, record: Mapping[str, Any], answer: list[Any]) -> Task:
        return Task(
            task_id=record["id"],
            question="\n".join(said["content"] for said in record["question"][0]),
            record={"functions": record["function"], "answers": answer},
            group=category,
        )


def score_calls(task: Task, text: str) -> Outcome:
    """Tell whether an answer makes the calls that the task needs, and no other."""
    try:
        calls = parse_json_calls(text)
        reason = match_calls(calls, task.record["answers"], task.record["functions"])
    except MalformedCallsError as error:
        reason = str(error)
    return Outcome(task_id=task.task_id, is_success=not reason, detail=reason or "calls match")
