import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lar_lightning.benchmarks import Task, benchmark_identity, load_benchmark, split_tasks
from lar_lightning.benchmarks.mbpp import Mbpp
from lar_lightning.errors import SettingError


def make_tasks(num_tasks: int) -> list[Task]:
    return [Task(task_id=f"task/{index}", question="", record={}) for index in range(num_tasks)]


def make_split_tasks(*flags: bool | None) -> list[Task]:
    return [replace(task, is_held_out=flags[i]) for i, task in enumerate(make_tasks(len(flags)))]


@given(st.data(), st.integers(2, 30), st.integers(0, 5))
def test_split_covers_each_task_once_in_any_input_order(data, num_tasks, seed):
    tasks = make_tasks(num_tasks)
    num_held_out = data.draw(st.integers(1, num_tasks - 1))
    training, held_out = split_tasks(tasks, num_held_out, seed)
    shuffled = data.draw(st.permutations(tasks))
    assert split_tasks(shuffled, num_held_out, seed) == (training, held_out)
    assert len(held_out) == num_held_out
    assert sorted(task.task_id for task in training + held_out) == sorted(
        task.task_id for task in tasks
    )


def test_split_is_the_same_in_every_version():
    held_out = split_tasks(make_tasks(10), 3, seed=0)[1]
    assert [task.task_id for task in held_out] == ["task/6", "task/3", "task/1"]


def test_split_changes_with_the_seed():
    splits = {split_tasks(make_tasks(50), 10, seed)[1][0].task_id for seed in range(10)}
    assert len(splits) > 1


@pytest.mark.parametrize("num_held_out", [-1, 0, 4, 5])
def test_split_without_a_task_on_one_side_is_refused(num_held_out):
    with pytest.raises(ValueError, match=rf"`num_held_out` .* between 1 and 3.*got {num_held_out}"):
        split_tasks(make_tasks(4), num_held_out, seed=0)


@pytest.mark.parametrize("num_tasks", [0, 1])
def test_split_of_too_few_tasks_is_refused(num_tasks):
    with pytest.raises(ValueError, match="at least 2 tasks"):
        split_tasks(make_tasks(num_tasks), 1, seed=0)


def test_split_of_duplicate_ids_is_refused():
    with pytest.raises(ValueError, match="unique task ids"):
        split_tasks(make_tasks(3) * 2, 1, seed=0)


@given(st.lists(st.sampled_from([True, False, None]), min_size=2, max_size=30), st.integers(0, 5))
def test_own_split_is_kept_and_the_rest_is_drawn(flags, seed):
    tasks = make_split_tasks(*flags)
    num_candidates = sum(flag is not False for flag in flags)
    if not num_candidates or all(flag is None for flag in flags):
        return
    training, held_out = split_tasks(tasks, num_candidates, seed)
    assert {task.is_held_out for task in training} <= {False}
    assert len(held_out) == num_candidates
    training, held_out = split_tasks(tasks, 1, seed)
    ids = {task.task_id for task in training} | {task.task_id for task in held_out}
    assert {task.task_id for task in tasks if task.is_held_out is not True} <= ids
    assert not {task.task_id for task in training} & {task.task_id for task in held_out}
    assert True not in {task.is_held_out for task in training}


def test_more_held_out_tasks_than_the_benchmark_has_are_refused():
    with pytest.raises(ValueError, match="between 1 and 1, the benchmark's own held-out tasks"):
        split_tasks(make_split_tasks(True, False, False), 2, seed=0)


@pytest.mark.parametrize("name", ["humanevil", "HumanEval"])
def test_unknown_benchmark_is_refused_with_the_near_name(name):
    with pytest.raises(ValueError, match=rf"`benchmark`.*'{name}'.*Did you mean 'humaneval'\?"):
        load_benchmark(name)


def test_unknown_benchmark_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"one of 'humaneval', 'mbpp'.*got 'zzz'\.$"):
        load_benchmark("zzz")


def test_benchmark_is_loaded_by_name():
    assert load_benchmark("humaneval").name == "humaneval"


def test_benchmark_is_loaded_with_its_options():
    benchmark = load_benchmark("mbpp?path=a%2Bb.jsonl&timeout=2.5")
    assert isinstance(benchmark, Mbpp)
    assert benchmark.path == "a+b.jsonl"
    assert benchmark.limits.wall_seconds == 2.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mbpp?paht=a", r"`benchmark: mbpp` must have options out of 'path', 'timeout'.*'paht'"),
        ("mbpp?timeout=fast", r"`timeout` must be a number of seconds .*got 'fast'"),
        ("mbpp?timeout=-1", r"`timeout` must be a number of seconds .*got '-1'"),
        ("mbpp?timeout=nan", r"`timeout` must be a number of seconds .*got 'nan'"),
        ("mbpp?limits=5", r"`limits` must be SandboxLimits, got '5'. Use `timeout`"),
        ("kodcode?num_tasks=0", r"`num_tasks` must be a whole number of 1 or more, got '0'"),
    ],
)
def test_wrong_option_is_refused(name, message):
    with pytest.raises(SettingError, match=message):
        load_benchmark(name)


@pytest.mark.parametrize("name", ["mbpp", "kodcode", "mbpp?path=nowhere.jsonl"])
def test_missing_path_is_refused_with_the_two_ways_out(name):
    with pytest.raises(SettingError, match=r"`path` must be .*\?path=FILE.*\?path=hub"):
        load_benchmark(name).load_tasks()


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, lar_lightning.benchmarks\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'vllm', 'numpy'}\n"
        "print(heavy & set(sys.modules), 'lar_lightning.benchmarks.humaneval' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "set() False\n", result.stderr


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("humaneval", "humaneval"),
        ("mbpp?path=/data/mbpp.jsonl", "mbpp"),
        ("bfcl?steps=2&path=x&category=base", "bfcl?category=base&steps=2"),
        ("triviaqa?corpus=/a/one.jsonl,/b/two.jsonl", "triviaqa?corpus=one.jsonl,two.jsonl"),
        ("triviaqa?retriever=http://host:80/search", "triviaqa?retriever=http://host:80/search"),
        ("humaneval+mbpp?path=x&timeout=9", "humaneval+mbpp?timeout=9"),
    ],
)
def test_files_may_move_and_options_may_not(text: str, identity: str) -> None:
    assert benchmark_identity(text) == identity
