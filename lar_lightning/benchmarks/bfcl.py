"""BFCL v4 multi-turn (Patil et al. 2025): a user's requests, fulfilled by calls of simulated APIs.

Rules of the official evaluation in its prompt mode, written anew; where this one departs from it:
- A malformed list of calls is answered with what is wrong and counts as a step; officially it ends
  the turn. Text before a list on a line of its own, and behind it, does not spoil it, and arguments
  may go without names.
- An episode that runs out of steps has failed, officially not so in its last turn.
- Functions are documented in a line each, unless `docs=full`; the words of the prompt are others.

Functions that the category `miss_func` shows later can be called before, as officially.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lar_lightning.benchmarks.benchmark import STYLES, Style, Task
from lar_lightning.benchmarks.tools.apis import (
    MODULES,
    World,
    find_data,
    read_answered,
    read_records,
)
from lar_lightning.benchmarks.tools.calls import parse_calls
from lar_lightning.benchmarks.tools.episode import BfclEpisode
from lar_lightning.benchmarks.tools.prompts import RENDERERS, addition, instruction, request
from lar_lightning.errors import SettingError, one_of

CATEGORIES = ("base", "miss_func", "miss_param", "long_context")
MAX_REQUESTS = 8
"""Most turns of a task in any category."""


class Bfcl:
    """The multi-turn part of the Berkeley Function Calling Leaderboard."""

    name = "bfcl"
    styles: tuple[Style, ...] = STYLES
    markers: tuple[str, ...] = ("[",)

    def __init__(
        self,
        path: Path | str | None = None,
        category: str = "base",
        steps: int | str = 10,
        docs: str = "compact",
    ) -> None:
        """Set which tasks are played and how.

        Args:
            path: Folder with the data files; default: those of the wheel `bfcl-eval`, which has
                the APIs in any case.
            category: `base`, `miss_func`, `miss_param` or `long_context`.
            steps: Actions with calls that each request may take; officially 20.
            docs: `compact`, a line for each function, or `full`, the records as JSON.
        """
        self.path = None if path is None else Path(path)
        self.category = one_of("category", category.removeprefix("multi_turn_"), CATEGORIES)
        self.render = RENDERERS[one_of("docs", docs, RENDERERS)]
        if not str(steps).isdecimal() or int(steps) < 1:
            raise SettingError(f"`steps` must be a whole number of at least 1, got {steps!r}.")
        self.steps = int(steps)

    def load_tasks(self) -> list[Task]:
        """Return the 200 tasks of the category in file order."""
        wheel = find_data()  # the APIs come from it also where the data do not
        file = f"BFCL_v4_multi_turn_{self.category}.json"
        return [
            self._make_task(record, answer)
            for record, answer in read_answered(self.path or wheel, file)
        ]

    def messages(self, task: Task, style: Style) -> list[dict[str, str]]:
        """Return instruction, functions and the first request in one user message."""
        late = {name for names in task.record["late_functions"].values() for name in names}
        functions = self._document(task, lambda name: name not in late)
        return [{"role": "user", "content": instruction(style, functions, task.question)}]

    def stops(self, style: Style) -> tuple[str, ...]:
        """Return the end of a list at the end of a line: small models invent the results next."""
        return (")]\n",)

    def max_turns(self, style: Style) -> int:
        """Return what the steps of all turns come to."""
        return MAX_REQUESTS * (self.steps + 1)

    def open(self, task: Task, style: Style) -> BfclEpisode:
        """Make two worlds, one for the policy and one for the reference calls."""
        record = task.record
        parameters = {
            name: {
                doc["name"]: tuple(doc["parameters"]["properties"]) for doc in self.documents(name)
            }
            for name in record["involved_classes"]
        }
        has_long_context = self.category == "long_context"
        world, reference = (
            World(parameters, record["initial_config"], has_long_context=has_long_context)
            for _ in range(2)
        )
        requests = [self._request_at(task, turn) for turn in range(len(record["requests"]))]
        calls = [[parse_calls(f"[{call}]")[0] for call in turn] for turn in record["calls"]]
        return BfclEpisode(task.task_id, requests, calls, world, reference, self.steps)

    def _make_task(self, record: Mapping[str, Any], calls: list[list[str]]) -> Task:
        requests = ["\n".join(said["content"] for said in turn) for turn in record["question"]]
        return Task(
            task_id=record["id"],
            question=requests[0],
            record={
                "requests": requests,
                "calls": calls,
                "initial_config": record["initial_config"],
                "involved_classes": record["involved_classes"],
                "late_functions": record.get("missed_function", {}),
            },
            group=self.category,
        )

    def _request_at(self, task: Task, turn: int) -> str:
        names = task.record["late_functions"].get(str(turn), ())
        text = task.record["requests"][turn]
        if names:
            text = addition(self._document(task, lambda name: name in names))
        return request(text)

    def _document(self, task: Task, is_shown: Callable[[str], bool]) -> str:
        docs = (doc for name in task.record["involved_classes"] for doc in self.documents(name))
        return self.render([doc for doc in docs if is_shown(doc["name"])])

    def documents(self, class_name: str) -> list[dict[str, Any]]:
        """Return the records that document the functions of an API."""
        return _read_docs(self.path or find_data(), class_name)


@functools.cache
def _read_docs(folder: Path, class_name: str) -> list[dict[str, Any]]:
    return read_records(folder, f"multi_turn_func_doc/{MODULES[class_name]}.json")
