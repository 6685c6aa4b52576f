import copy
import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lar_lightning.benchmarks import load_benchmark
from lar_lightning.benchmarks.benchmark import Task
from lar_lightning.benchmarks.bfcl_single import FILES, BfclSingle
from lar_lightning.benchmarks.tools.calls import Call, MalformedCallsError
from lar_lightning.benchmarks.tools.json_calls import parse_json_calls
from lar_lightning.benchmarks.tools.matching import match_calls
from lar_lightning.errors import SettingError
from tests.test_bfcl import DATA, needs_wheel

DOCUMENT = {
    "name": "weather.find",
    "description": "Finds the weather. It must be asked for by city.",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string", "description": "The city."},
            "days": {"type": "integer", "description": "How many."},
            "limit": {"type": "float", "description": "The least."},
            "kinds": {"type": "array", "items": {"type": "string"}, "description": "Which."},
            "place": {"type": "dict", "description": "Where."},
            "stops": {"type": "array", "items": {"type": "dict"}, "description": "Between."},
            "is_short": {"type": "boolean", "description": "Whether."},
        },
        "required": ["city"],
    },
}
UNDOCUMENTED = ("parallel_multiple_12", "parallel_multiple_26")
"""Tasks whose answers hold an optional parameter that the function does not have."""
ALLOWED: dict[str, list[Any]] = {
    "city": ["New York, NY", "New York"],
    "days": ["", 3],
    "limit": ["", 2.0],
    "kinds": ["", ["rain", "Snow"]],
    "place": ["", {"north": [1, 2], "name": ["", "Here"]}],
    "stops": ["", [{"name": ["Here"]}]],
    "is_short": ["", True],
}
ANSWER = {"weather.find": ALLOWED}


def call(**named: Any) -> Call:
    return Call(name="weather.find", positional=(), named=named)


def reason(*calls: Call, answers: int = 1) -> str:
    return match_calls(calls, [ANSWER] * answers, [DOCUMENT])


@pytest.mark.parametrize(
    "named",
    [
        {"city": "New York"},
        {"city": "new york - NY"},
        {"city": "New York", "days": 3},
        {"city": "New York", "limit": 2},
        {"city": "New York", "kinds": ["RAIN", "snow"]},
        {"city": "New York", "place": {"north": 2}},
        {"city": "New York", "place": {"north": 1, "name": "here"}},
        {"city": "New York", "stops": [{"name": "HERE"}]},
        {"city": "New York", "is_short": True},
    ],
)
def test_calls_with_allowed_values_match(named: dict[str, Any]) -> None:
    assert reason(call(**named)) == ""


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({}, "weather.find without city"),
        ({"city": "Boston"}, "wrong city of weather.find"),
        ({"city": "New York", "days": 4}, "wrong days of weather.find"),
        ({"city": "New York", "days": "3"}, "wrong days of weather.find"),
        ({"city": "New York", "days": 3.0}, "wrong days of weather.find"),
        ({"city": "New York", "days": True}, "wrong days of weather.find"),
        ({"city": "New York", "kinds": ["snow", "rain"]}, "wrong kinds of weather.find"),
        ({"city": "New York", "kinds": "rain"}, "wrong kinds of weather.find"),
        ({"city": "New York", "place": {"name": "Here"}}, "wrong place of weather.find"),
        ({"city": "New York", "place": {"north": 1, "up": 1}}, "wrong place of weather.find"),
        ({"city": "New York", "stops": ["Here"]}, "wrong stops of weather.find"),
        ({"city": "New York", "stops": [{"name": "There"}]}, "wrong stops of weather.find"),
        ({"city": "New York", "is_short": 1}, "wrong is_short of weather.find"),
        ({"city": "New York", "hours": 1}, "weather.find has no parameter hours"),
    ],
)
def test_what_is_wrong_with_a_call_is_said(named: dict[str, Any], expected: str) -> None:
    assert reason(call(**named)) == expected


def test_an_optional_parameter_without_the_empty_text_must_be_given() -> None:
    answer = {"weather.find": {"city": ["Rome"], "days": [3]}}
    assert match_calls([call(city="Rome")], [answer], [DOCUMENT]) == "weather.find without days"
    assert match_calls([call(city="Rome", days=3)], [answer], [DOCUMENT]) == ""


def test_several_calls_match_in_any_order_and_each_once() -> None:
    other = {"weather.find": {"city": ["Rome"]}}
    rome, york = call(city="Rome"), call(city="New York")
    assert match_calls([rome, york], [ANSWER, other], [DOCUMENT]) == ""
    assert match_calls([york, york], [ANSWER, other], [DOCUMENT]) == "wrong city of weather.find"
    assert match_calls([york], [ANSWER, other], [DOCUMENT]) == "1 calls, expected 2"
    assert match_calls([], [ANSWER], [DOCUMENT]) == "0 calls, expected 1"


def test_a_call_of_another_function_is_named() -> None:
    stranger = Call(name="weather_find", positional=(), named={"city": "New York"})
    assert reason(stranger) == "weather_find called, expected weather.find"


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"a": [1, "}"]}}',
        '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}"]}}\n</tool_call>',
        '```json\n[{"name": "f", "arguments": {"a": [1, "}"]}}]\n```',
        'I call f.\n{ "name" : "f", "arguments": {"a": [1, "}"]}} Done.',
        '<think>{"name": "g"</think>{"name": "f", "arguments": {"a": [1, "}"]}}',
    ],
)
def test_calls_are_read_wherever_they_stand(text: str) -> None:
    assert parse_json_calls(text) == (Call(name="f", positional=(), named={"a": [1, "}"]}),)


def test_calls_one_below_the_other_are_read_in_order() -> None:
    text = '{"name": "f", "arguments": {}}\n{"name": "g"}'
    assert [found.name for found in parse_json_calls(text)] == ["f", "g"]
    assert parse_json_calls("There is nothing to call.") == ()


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"a": True}}',
        '{"name": "f", "arguments": {"a": 1}',
        '{"name": "f", "arguments": [1]}',
        '{"name": 3, "arguments": {}}',
        '{"name": "f", "arguments": ' + "[" * 50_000,
    ],
)
def test_malformed_calls_are_refused_with_a_reason(text: str) -> None:
    with pytest.raises(MalformedCallsError):
        parse_json_calls(text)


@needs_wheel
def test_the_wheel_has_a_thousand_tasks_in_four_categories() -> None:
    tasks = BfclSingle().load_tasks()
    sizes = {name: sum(task.group == name for task in tasks) for name in FILES}
    assert sizes == {"simple": 400, "multiple": 200, "parallel": 200, "parallel_multiple": 200}
    assert len({task.task_id for task in tasks}) == 1000


@needs_wheel
def test_reference_calls_are_right_and_a_missing_one_is_wrong() -> None:
    benchmark = BfclSingle()
    for task in benchmark.load_tasks():
        if task.task_id in UNDOCUMENTED:
            continue
        lines = list(map(written, task.record["answers"]))
        environment = benchmark.open(task, "direct")
        assert environment.step("\n".join(lines)).is_over
        outcome = environment.outcome()
        assert outcome.is_success, (task.task_id, outcome.detail)
        environment.step("\n".join(lines[1:]))
        assert not environment.outcome().is_success, task.task_id


def written(answer: dict[str, dict[str, list[Any]]]) -> str:
    """Write a call with the first value that is allowed for each parameter."""
    ((name, allowed),) = answer.items()
    return json.dumps({"name": name, "arguments": chosen(allowed)})


def chosen(allowed: dict[str, list[Any]]) -> dict[str, Any]:
    return {
        key: first(next(value for value in values if value != ""))
        for key, values in allowed.items()
        if set(map(str, values)) != {""}
    }


def first(value: Any) -> Any:
    if isinstance(value, dict):
        return chosen(value)
    return list(map(first, value)) if isinstance(value, list) else value


@needs_wheel
@pytest.mark.parametrize("docs", ["full", "compact"])
def test_a_task_shows_its_functions_and_request_and_no_answer(docs: str) -> None:
    benchmark = BfclSingle(docs=docs, category="multiple")
    task = benchmark.load_tasks()[0]
    (message,) = benchmark.messages(task, "direct")
    names = [document["name"] for document in task.record["functions"]]
    assert len(names) > 1
    assert all(name in message["content"] for name in names)
    assert message["content"].endswith(task.question)
    assert "<think>" not in message["content"]
    assert "<think>" in benchmark.messages(task, "cot")[0]["content"]


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data files are absent")
@needs_wheel
def test_files_and_wheel_hold_the_same_tasks() -> None:
    ours = load_benchmark(f"bfcl_single?path={DATA}").load_tasks()
    assert ours == load_benchmark("bfcl_single").load_tasks()


@pytest.mark.parametrize("options", ["category=easy", "category=simple,", "docs=long"])
def test_unknown_options_are_refused(options: str) -> None:
    with pytest.raises(SettingError, match="must be one of"):
        load_benchmark(f"bfcl_single?{options}")


def test_missing_files_are_named(tmp_path: Path) -> None:
    benchmark = BfclSingle(path=tmp_path)
    with pytest.raises(SettingError, match="which has no possible_answer/BFCL_v4_simple_python"):
        benchmark.load_tasks()


# Against the wheel's own checker, whose module only loads where stand-ins take the place of the
# model handlers it imports.


@pytest.fixture(scope="module")
def official() -> Any:
    stand_in = types.ModuleType("bfcl_eval.constants.model_config")
    config = types.SimpleNamespace(underscore_to_dot=False)
    stand_in.MODEL_CONFIG_MAPPING = {"any": config}  # type: ignore[attr-defined]
    others: dict[str, types.ModuleType] = {stand_in.__name__: stand_in}
    for language in ("java", "js"):
        name = f"bfcl_eval.eval_checker.ast_eval.type_convertor.{language}_type_converter"
        others[name] = types.ModuleType(name)
        setattr(others[name], f"{language}_type_converter", None)
    before = {name: sys.modules.get(name) for name in others}
    sys.modules.update(others)
    try:
        file = importlib.metadata.distribution("bfcl-eval").locate_file(
            "bfcl_eval/eval_checker/ast_eval/ast_checker.py"
        )
        spec = importlib.util.spec_from_file_location("official_ast_checker", str(file))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, module_before in before.items():
            if module_before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module_before
    return module


def officially_right(official: Any, task: Task, calls: list[Call]) -> bool:
    try:
        verdict = official.ast_checker(
            task.record["functions"],
            [{each.name: copy.deepcopy(each.named)} for each in calls],
            task.record["answers"],
            official.Language.PYTHON,
            task.group,
            "any",
        )
    except (TypeError, AttributeError):
        return False  # it breaks where a value has a type that it does not expect
    return bool(verdict["valid"])


def is_right(task: Task, calls: list[Call]) -> bool:
    return not match_calls(calls, task.record["answers"], task.record["functions"])


STRANGE = st.sampled_from([None, True, 0, 1, 3, 2.5, "", "x", [], ["x"], [1], {}, {"a": 1}, [{}]])


@needs_wheel
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_calls_are_judged_as_officially(official: Any, data: st.DataObject) -> None:
    tasks = all_tasks()
    task = tasks[data.draw(st.integers(0, len(tasks) - 1))]
    calls = []
    for answer in task.record["answers"]:
        ((name, allowed),) = answer.items()
        named = {}
        for key, values in allowed.items():
            value = data.draw(st.sampled_from(values), label=key)
            if isinstance(value, dict):
                value = {k: data.draw(st.sampled_from(each)) for k, each in value.items()}
                value = {k: each for k, each in value.items() if each != ""}
            if isinstance(value, str) and data.draw(st.booleans()):
                value = value.upper().replace(" ", "-")
            if value != "" or data.draw(st.booleans()):
                named[key] = value
        change = data.draw(st.sampled_from(["nothing", "drop", "replace", "add"]))
        if change == "drop" and named:
            del named[data.draw(st.sampled_from(sorted(named)))]
        elif change == "replace" and named:
            named[data.draw(st.sampled_from(sorted(named)))] = data.draw(STRANGE)
        elif change == "add":
            named["unheard_of"] = data.draw(STRANGE)
        calls.append(Call(name=name, positional=(), named=named))
    calls = data.draw(st.permutations(calls))
    if task.group == "parallel" and data.draw(st.booleans()):
        calls = calls[1:]
    assert is_right(task, calls) == officially_right(official, task, calls)


def all_tasks() -> list[Task]:
    if not _TASKS:
        _TASKS.extend(BfclSingle().load_tasks())
    return _TASKS


_TASKS: list[Task] = []
