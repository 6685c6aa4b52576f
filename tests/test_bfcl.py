import ast
import gzip
import importlib
import importlib.metadata
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lar_lightning.benchmarks import load_benchmark
from lar_lightning.benchmarks.benchmark import STYLES, Outcome, Task
from lar_lightning.benchmarks.bfcl import CATEGORIES, MAX_REQUESTS, Bfcl
from lar_lightning.benchmarks.tools import apis as bfcl_apis
from lar_lightning.benchmarks.tools.apis import BFCL_VERSION, MODULES, World
from lar_lightning.benchmarks.tools.calls import Call, parse_calls
from lar_lightning.benchmarks.tools.episode import BfclEpisode
from lar_lightning.benchmarks.tools.prompts import render_compact
from lar_lightning.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

try:
    VERSION = importlib.metadata.version("bfcl-eval")
except importlib.metadata.PackageNotFoundError:
    VERSION = None
needs_wheel = pytest.mark.skipif(
    VERSION != BFCL_VERSION,
    reason=f"the wheel is not installed: pip install --no-deps bfcl-eval=={BFCL_VERSION}",
)
DATA = Path(__file__).parents[2] / "shared" / "data" / "bench_bfcl"
Turns = list[list[str]]


def listed(calls: list[str]) -> str:
    return f"[{', '.join(calls)}]"


def play(episode: BfclEpisode, turns: Turns) -> Outcome:
    """Call each turn's functions at once, then end the turn."""
    for calls in turns:
        if calls:
            episode.step(listed(calls))
        episode.step("Done.")
    return episode.outcome()


def task_of(benchmark: Bfcl, number: int) -> Task:
    return next(task for task in benchmark.load_tasks() if task.task_id.endswith(f"_{number}"))


def world(class_name: str, initial: dict[str, Any]) -> World:
    docs = Bfcl().documents(class_name)
    parameters = {class_name: {doc["name"]: list(doc["parameters"]["properties"]) for doc in docs}}
    return World(parameters, {class_name: initial}, has_long_context=False)


def run(world: World, name: str, *positional: Any, **named: Any) -> str:
    return world.run(Call(name=name, positional=positional, named=named))


@needs_wheel
@pytest.mark.parametrize("category", CATEGORIES)
def test_reference_calls_pass_in_every_task(category: str) -> None:
    benchmark = Bfcl(category=category)
    tasks = benchmark.load_tasks()
    assert len({task.task_id for task in tasks}) == 200
    for task in tasks:
        assert len(task.record["calls"]) <= MAX_REQUESTS
        outcome = play(benchmark.open(task, "direct"), task.record["calls"])
        assert outcome.detail == "passed"
        assert outcome.is_success
        assert outcome.metrics == {"turns_right": 1.0, "calls_valid": 1.0}


@needs_wheel
def test_reference_calls_pass_on_many_threads_at_once() -> None:
    benchmark = Bfcl()
    math_tasks = [
        task for task in benchmark.load_tasks() if "MathAPI" in task.record["involved_classes"]
    ]
    with ThreadPoolExecutor(8) as pool:
        outcomes = pool.map(
            lambda task: play(benchmark.open(task, "direct"), task.record["calls"]), math_tasks * 4
        )
    assert all(outcome.is_success for outcome in outcomes)


def corrupted(turns: Turns, draw: random.Random) -> Iterator[Turns]:
    """Yield one of each kind: dropped, altered, repeated, reversed, added, emptied, too late."""
    places = [(turn, call) for turn, calls in enumerate(turns) for call in range(len(calls))]
    turn, call = draw.choice(places)

    def with_calls(calls: list[str]) -> Turns:
        return [*turns[:turn], calls, *turns[turn + 1 :]]

    calls = turns[turn]
    yield with_calls(calls[:call] + calls[call + 1 :])
    tree = ast.parse(calls[call], mode="eval").body
    assert isinstance(tree, ast.Call)
    values = [*tree.args, *(keyword.value for keyword in tree.keywords)]
    constants = [value for value in values if isinstance(value, ast.Constant)]
    if constants:
        constant = draw.choice(constants)
        value: Any = constant.value
        constant.value = not value if isinstance(value, bool) else (value * 2 if value else "x")
        yield with_calls([*calls[:call], ast.unparse(tree), *calls[call + 1 :]])
    yield with_calls([*calls[: call + 1], *calls[call:]])
    yield with_calls(calls[::-1])
    yield with_calls([*calls, "no_such_function(a=1)"])
    other_turn, other_call = draw.choice(places)
    yield with_calls([*calls, turns[other_turn][other_call]])
    yield with_calls([])
    if turn + 1 < len(turns):
        late = with_calls([])
        late[turn + 1] = calls + late[turn + 1]
        yield late


@needs_wheel
@pytest.mark.parametrize("category", CATEGORIES)
def test_verdicts_on_mistakes_are_those_of_the_official_checker(category: str) -> None:
    checker = importlib.import_module(
        "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker"
    ).multi_turn_checker
    benchmark = Bfcl(category=category)
    verdicts: Counter[tuple[bool, bool]] = Counter()
    draw = random.Random(0)
    for task in draw.sample(benchmark.load_tasks(), 30):
        entry = {"id": task.task_id} | {
            key: task.record[key] for key in ("initial_config", "involved_classes")
        }
        for number, turns in enumerate(corrupted(task.record["calls"], draw)):
            steps = [[calls] if calls else [] for calls in turns]
            # It keeps its instances by this name.
            name = f"{category}{number}"
            official = checker(steps, task.record["calls"], entry, task.task_id, name)["valid"]
            outcome = play(benchmark.open(task, "direct"), turns)
            assert outcome.is_success == official, (task.task_id, turns, outcome)
            verdicts[official, outcome.is_success] += 1
    assert verdicts[False, False] > 60
    assert verdicts[True, True] > 30


@needs_wheel
@pytest.mark.parametrize(
    ("turns", "detail"),
    [
        ([[]], "turn 1: no call"),
        ([["cd('document')"]], "turn 1: GorillaFileSystem.root is not as after"),
        ([["cd('document')", "mkdir('temp')", "mv('final_report.pdf', 'temp')"]], ""),
        ([["cd('document')", "mkdir('temp')", "mv('final_report.pdf', 'temp')"], ["pwd()"]], ""),
    ],
)
def test_failure_names_the_first_wrong_turn(turns: Turns, detail: str) -> None:
    benchmark = Bfcl()
    task = task_of(benchmark, 0)
    outcome = play(benchmark.open(task, "direct"), turns + task.record["calls"][len(turns) :])
    assert outcome.is_success == (not detail and len(turns) == 1)
    assert outcome.detail.startswith(detail or ("passed" if len(turns) == 1 else "turn 2: no call"))
    assert outcome.metrics["turns_right"] == (0.0 if detail else 1.0 if len(turns) == 1 else 0.25)


@needs_wheel
def test_result_found_in_an_earlier_turn_need_not_be_found_again() -> None:
    benchmark = Bfcl()
    task = task_of(benchmark, 0)
    turns: Turns = [list(calls) for calls in task.record["calls"]]
    search = turns[1].pop()
    turns[0] += [turns[1].pop(), search]
    turns[1] = ["pwd()"]
    assert play(benchmark.open(task, "direct"), turns).is_success


@needs_wheel
def test_episode_goes_from_request_to_results_to_request_until_the_last() -> None:
    benchmark = Bfcl()
    task = task_of(benchmark, 0)
    episode = benchmark.open(task, "react")
    observation = episode.step("<think>Go there.</think>\n[cd(folder='document')]\n")
    assert observation.text == 'Results:\n{"current_working_directory": "document"}'
    observation = episode.step("[mkdir(dir_name='temp'), mkdir(dir_name='temp')]")
    assert observation.text.startswith('Results:\nNone\n{"error": "mkdir: cannot create')
    for request in task.record["requests"][1:]:
        observation = episode.step("Done [as you see].")
        assert observation.text == f"Request:\n{request}"
        assert not observation.is_over
    assert episode.step("").is_over
    assert not episode.outcome().is_success


@needs_wheel
@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("[cd(folder='document'", "Error: The calls cannot be read ('(' was never closed)."),
        ("[cd(folder=find(name='x'))]", "Error: Arguments must be plain values"),
        ("[open_door(x=1)]", "Error during execution: there is no function 'open_door'."),
        ("[GorillaFileSystem.cd(folder='x')]", "Did you mean 'cd'?"),
        ("[cd(directory='x')]", "Error during execution: "),
        ("[cd('x', 'y')]", "Error during execution: cd takes 1 arguments."),
        ("[cd('x', folder='y')]", "Error during execution: cd got 'folder' twice."),
        ("[_load_scenario(scenario={})]", "there is no function '_load_scenario'"),
        ("[__class__()]", "there is no function '__class__'"),
        ('[{"name": "cd", "arguments": {"folder": "x"}}]', "Error: Calls are not written as JSON."),
    ],
)
def test_malformed_or_wrong_calls_are_answered_with_what_is_wrong(action: str, text: str) -> None:
    benchmark = Bfcl()
    episode = benchmark.open(task_of(benchmark, 0), "direct")
    observation = episode.step(action)
    assert text in observation.text
    assert not observation.is_over


@needs_wheel
def test_endless_calls_end_the_episode_as_failed() -> None:
    benchmark = Bfcl(steps="3")
    task = task_of(benchmark, 0)
    episode = benchmark.open(task, "direct")
    assert [episode.step("[pwd()]").is_over for _ in range(4)] == [False, False, False, True]
    outcome = episode.outcome()
    assert outcome.detail == "turn 1: more than 3 steps"
    assert not outcome.is_success
    assert benchmark.max_turns("direct") == MAX_REQUESTS * 4


@needs_wheel
def test_cut_off_episode_is_scored_as_failed_with_its_right_turns() -> None:
    benchmark = Bfcl()
    task = task_of(benchmark, 0)
    episode = benchmark.open(task, "direct")
    episode.step(listed(task.record["calls"][0]))
    episode.step("Done.")
    episode.step("[cd(")
    outcome = episode.outcome()
    assert outcome.detail == "turn 2: cut off"
    assert outcome.metrics == {"turns_right": 0.25, "calls_valid": 0.5}


@needs_wheel
def test_held_back_functions_are_shown_when_the_record_says() -> None:
    benchmark = Bfcl(category="multi_turn_miss_func")
    task = task_of(benchmark, 0)
    (message,) = benchmark.messages(task, "direct")
    assert "grep(file_name" in message["content"]
    assert "sort(file_name" not in message["content"]
    episode = benchmark.open(task, "direct")
    texts = [episode.step("No.").text for _ in range(4)]
    assert ["sort(file_name: str)" in text for text in texts] == [False, False, True, False]


@needs_wheel
def test_long_context_answers_are_longer() -> None:
    lengths = {}
    for category in ("base", "long_context"):
        benchmark = Bfcl(category=category)
        task = task_of(benchmark, 0)
        lengths[category] = len(benchmark.open(task, "direct").step("[find()]").text)
    assert lengths["long_context"] > 5 * lengths["base"]


@needs_wheel
@pytest.mark.parametrize("style", STYLES)
def test_first_message_holds_functions_and_request_in_each_style(style: Any) -> None:
    benchmark = Bfcl()
    task = task_of(benchmark, 0)
    (message,) = benchmark.messages(task, style)
    assert message["content"].endswith(f"Request:\n{task.question}")
    assert "mv(source: str, destination: str)" in message["content"]
    assert ("<think>" in message["content"]) == (style != "direct")
    assert ("Results:" in message["content"]) == (style == "react")


@needs_wheel
def test_full_documentation_is_the_records() -> None:
    benchmark = Bfcl(docs="full")
    (message,) = benchmark.messages(task_of(benchmark, 0), "direct")
    lines = [line for line in message["content"].splitlines() if line.startswith('{"name"')]
    assert [json.loads(line) for line in lines] == benchmark.documents(
        "TwitterAPI"
    ) + benchmark.documents("GorillaFileSystem")


@needs_wheel
def test_compact_prompts_fit_small_contexts(smollm2_tokenizer: "PreTrainedTokenizerFast") -> None:
    benchmark = Bfcl()
    counts = sorted(
        len(smollm2_tokenizer(benchmark.messages(task, "react")[0]["content"])["input_ids"])  # type: ignore[arg-type]
        for task in benchmark.load_tasks()
    )
    assert counts[-1] < 2000


@needs_wheel
def test_documented_functions_are_all_that_the_classes_have() -> None:
    for class_name in MODULES:
        cls = bfcl_apis._load_class(class_name)
        public = {name for name in vars(cls) if not name.startswith("_")}
        assert public == {doc["name"] for doc in Bfcl().documents(class_name)}


@needs_wheel
@pytest.mark.parametrize(
    "call",
    [
        "power(base=10, exponent=1000000000)",
        "power(2, 10000000)",
        "logarithm(value=2, base=3, precision=100000000)",
        "square_root(number=2, precision=100000000)",
        "round_number(number=5, decimal_places=-1000000000)",
    ],
)
def test_numbers_of_a_billion_digits_are_refused(call: str) -> None:
    (parsed,) = parse_calls(f"[{call}]")
    assert "is beyond 1000" in world("MathAPI", {}).run(parsed)


@needs_wheel
def test_a_call_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    files = world("GorillaFileSystem", {})
    wait = threading.Event()
    monkeypatch.setattr(files.instances["GorillaFileSystem"], "pwd", wait.wait)
    monkeypatch.setattr(bfcl_apis, "CALL_SECONDS", 0.05)
    assert run(files, "pwd") == "Error during execution: no result in 0.05 s."
    wait.set()


@needs_wheel
@pytest.mark.skipif(not DATA.is_dir(), reason="the folder with shared data is not there")
@pytest.mark.parametrize("category", CATEGORIES)
def test_flat_gzipped_folder_reads_like_the_wheel(category: str) -> None:
    flat, wheel = Bfcl(path=str(DATA), category=category), Bfcl(category=category)
    tasks = wheel.load_tasks()
    assert flat.load_tasks() == tasks
    assert flat.messages(tasks[0], "cot") == wheel.messages(tasks[0], "cot")


@needs_wheel
def test_folder_without_a_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"has no possible_answer/BFCL_v4_multi_turn_base\.json"):
        Bfcl(path=tmp_path).load_tasks()
    shutil.copytree(bfcl_apis.find_data() / "possible_answer", tmp_path / "possible_answer")
    record = {"id": "multi_turn_base_999", "question": [], "initial_config": {}}
    with gzip.open(tmp_path / "BFCL_v4_multi_turn_base.json.gz", "wt") as file:
        file.write(json.dumps(record))
    with pytest.raises(SettingError, match=r"without those of multi_turn_base_999\."):
        Bfcl(path=tmp_path).load_tasks()


def test_missing_wheel_is_refused_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", find_nothing)
    with pytest.raises(SettingError, match=r"pip install --no-deps bfcl-eval==\d"):
        Bfcl().load_tasks()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("category=memory", r"`category` must be one of 'base', .*, got 'memory'"),
        ("docs=short", r"`docs` must be one of 'compact', 'full', got 'short'"),
        ("steps=0", r"`steps` must be a whole number of at least 1, got '0'"),
        ("steps=ten", r"`steps` must be a whole number of at least 1, got 'ten'"),
    ],
)
def test_wrong_option_is_refused(options: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        load_benchmark(f"bfcl?{options}")


def test_compact_line_keeps_types_choices_defaults_and_rules() -> None:
    record = {
        "name": "book",
        "description": "This tool belongs to X. Tool description: Book a seat. All are nice.",
        "parameters": {
            "properties": {
                "day": {"type": "string", "description": "The day. In the format YYYY-MM-DD."},
                "kind": {"type": "string", "description": 'Kind. [Enum]: ["a", "b"]'},
                "names": {"type": "array", "items": {"type": "string"}},
                "extras": {"type": "dict", "properties": {"meal": {}, "bag": {}}},
                "note": {
                    "type": "string",
                    "description": "Note. Defaults to 1.",
                    "default": "None",
                },
            }
        },
    }
    assert render_compact([record]) == (
        "book(day: str, kind: 'a' | 'b', names: list[str], extras: dict with 'meal' | 'bag', "
        "note: str = None)  # Book a seat. day: In the format YYYY-MM-DD."
    )
