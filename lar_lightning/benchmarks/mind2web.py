"""Mind2Web (Deng et al. 2023): which element of a page to act on next, and how.

Each action of a person on a website is one task: a choice among ten candidate elements, the right
one and nine others drawn with a fixed seed, and "None of the above". As in the official training
set, a share of the tasks, `negative_ratio`, shows only others: there, and where cleaning the page
has removed the right element, none of the above is right. Ranks of candidates are not used.

Scores are those of `web_answers`; an outcome's success is the step's.
"""

from pathlib import Path
from string import ascii_uppercase

from lar_lightning.benchmarks.benchmark import Environment, Style, Task
from lar_lightning.benchmarks.one_answer import OneAnswer
from lar_lightning.benchmarks.web.answers import score_answer
from lar_lightning.benchmarks.web.splits import draw_number, draw_order, find_group
from lar_lightning.benchmarks.web.steps import (
    NUM_CANDIDATES,
    WebStep,
    limit_steps,
    read_hub,
    read_steps,
)
from lar_lightning.errors import SettingError

NUM_PREVIOUS = 5
QUESTION = """Someone does a task on a website. Choose what to do next.

Website: {website}
Task: {goal}
Previous actions:
{previous}

Elements:
{options}"""
FORMAT = """these three lines:
Element: the letter of the element
Action: CLICK, TYPE or SELECT
Value: the text to type or the option to select, without quotation marks; None for CLICK
If none of the elements is right, write only the line `Element:` with the letter of the last one."""
INSTRUCTIONS: dict[Style, str] = {
    "direct": f"Answer with {FORMAT}",
    "cot": f"Think step by step between <think> and </think>, then answer with {FORMAT}",
}


class Mind2Web:
    """The Mind2Web benchmark, its training part read from the hub or any part from local files."""

    name = "mind2web"
    styles: tuple[Style, ...] = ("direct", "cot")
    markers = ("Element:",)

    def __init__(
        self,
        path: Path | str | None = None,
        steps_per_task: int | str | None = None,
        negative_ratio: float | str = 0.1,
    ) -> None:
        """Set where the steps come from and how many are used.

        Args:
            path: Json file in the official layout, or a folder of these; jsonl file, plain or
                gzipped, without HTML or with SeeAct's prompts. Files whose name or folder begins
                with `test_task`, `test_website` or `test_domain` are held out; where there is none,
                a part of the training tasks is (`web_splits`). Default: the hub's training part.
            steps_per_task: Most steps of one website task, drawn; default: all.
            negative_ratio: Share of the steps that show only wrong elements.
        """
        self.path = None if path is None else Path(path)
        self.steps_per_task = _read_count(steps_per_task)
        self.negative_ratio = _read_share(negative_ratio)

    def load_tasks(self) -> list[Task]:
        """Return the steps in file order, without those that the limit leaves out."""
        steps = list(read_hub() if self.path is None else read_steps(self.path))
        has_test_part = any(step.part.startswith("test_") for step in steps)
        if self.steps_per_task is not None:
            steps = limit_steps(steps, self.steps_per_task)
        return [make_task(step, self.negative_ratio, has_test_part) for step in steps]

    def messages(self, task: Task, style: Style) -> list[dict[str, str]]:
        """Return one user message: the step and the answer's format."""
        return [{"role": "user", "content": f"{task.question}\n\n{INSTRUCTIONS[style]}"}]

    def stops(self, style: Style) -> tuple[str, ...]:
        """Return no stop: an answer ends by itself."""
        return ()

    def max_turns(self, style: Style) -> int:
        """Return one: a step is one answer."""
        return 1

    def open(self, task: Task, style: Style) -> Environment:
        """Make the environment that takes the answer."""
        return OneAnswer(task=task, score=score_answer)


def make_task(step: WebStep, negative_ratio: float, has_test_part: bool) -> Task:
    """Put a step as a multiple choice; whether it is held out is told by files or drawn."""
    is_negative = draw_number("is_negative", step.step_id) < negative_ratio
    right = [] if step.positive is None or is_negative else [step.positive]
    shown = (*right, *step.negatives)[:NUM_CANDIDATES]
    views = [*draw_order(shown, step.step_id, "shuffle"), "None of the above"]
    letters = dict(zip(views, ascii_uppercase, strict=False))
    options = "\n".join(f"{letter}. {view}" for view, letter in letters.items())
    previous = "\n".join(step.previous[-NUM_PREVIOUS:]) or "None"
    group = step.part.replace("test_", "cross_") if step.part.startswith("test_") else ""
    if not has_test_part:
        group = find_group(step.subdomain, step.website, step.goal)
    return Task(
        task_id=step.step_id,
        question=QUESTION.format(
            website=step.website, goal=step.goal, previous=previous, options=options
        ),
        record={
            "goal_id": step.goal_id,
            "letters": "".join(letters.values()),
            "element": letters[right[0]] if right else letters[views[-1]],
            "operation": step.operation if right else "",
        },
        is_held_out=bool(group),
        group=group,
    )


def _read_count(value: int | str | None) -> int | None:
    if value is None or (str(value).isdecimal() and int(value) > 0):
        return None if value is None else int(value)
    raise SettingError(
        f"`steps_per_task` must be a whole number of at least 1, got {value!r}. Leave it out to "
        "use all steps."
    )


def _read_share(value: float | str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise SettingError(
            f"`negative_ratio` must be a number between 0 and 1, got {value!r}. The official "
            "idea is a small share, such as 0.1."
        )
    return share
