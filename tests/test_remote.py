"""The client of remote engines against a server that does what it is told to, faults included."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import train_tiny_tokenizer

from lar_lightning.agents.vanilla import Vanilla
from lar_lightning.base_models import load_tokenizer
from lar_lightning.benchmarks import load_benchmark
from lar_lightning.errors import EngineFailure, SettingError
from lar_lightning.evaluation.runner import Course, Method, _signature, open_engine
from lar_lightning.policies import Completion, Request, Sampling, generate, open_policy
from lar_lightning.policies.policy import entropy_upper_bound
from lar_lightning.policies.remote_engine import RemotePolicy
from lar_lightning.settings import EvaluationSettings, ParallelSettings, RolloutSettings

PROMPTS = [list(range(5, 9 + number)) for number in range(6)]
FREE = Sampling()
LISTED = {"token_id:7": -0.5, "token_id:8": -1.5}


class Server(ThreadingHTTPServer):
    """Writes the prompt backwards, after the faults that it is to have."""

    daemon_threads = True

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = load_tokenizer(checkpoint)
        self.card: dict[str, Any] = {"id": "tiny", "root": "/elsewhere", "max_model_len": 2048}
        self.faults: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.hung_up: list[bytes] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def do_GET(self) -> None:
        self.server.keys.add(self.headers["Authorization"])
        self.answer(200, {"data": [self.server.card]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            tokens = self.server.tokenizer(body["prompt"], add_special_tokens=False)
            return self.answer(200, {"tokens": tokens["input_ids"]})
        self.server.bodies.append(body)
        fault = self.server.faults.pop(0) if self.server.faults else ""
        match fault:
            case "busy":
                return self.answer(429, {"error": {"message": "later"}}, {"Retry-After": "0.2"})
            case "broken":
                return self.answer(500, {"error": {"message": "engine died"}})
            case "page":
                return self.answer(200, b"<html>hello</html>")
            case "other JSON":
                return self.answer(200, {"object": "list"})
            case "lost":
                return self.connection.close()
            case "cut off":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                return self.connection.close()
            case "slow":
                time.sleep(1.0)
            case "waiting":
                return self.wait_for_hang_up()
            case "key":
                return self.answer(401, {"error": {"message": self.headers["Authorization"]}})
            case "refused":
                words = f"no {self.headers['Authorization']}"
                return self.answer(400, {"error": {"message": words}})
        units = body["prompt"][::-1]
        choice: dict[str, Any] = {"finish_reason": "stop", "token_ids": units, "text": "?"}
        if fault == "broken off":
            choice["finish_reason"] = "abort"
        if fault == "text alone":
            del choice["token_ids"]
        if "logprobs" in body and fault != "no logprobs":
            choice["logprobs"] = {"top_logprobs": [LISTED] * len(units)}
        with suppress(OSError):
            self.answer(200, {"choices": [choice]})
        return None

    def wait_for_hang_up(self) -> None:
        self.connection.settimeout(30)
        with suppress(OSError):
            self.server.hung_up.append(self.connection.recv(1))


@contextmanager
def serving(checkpoint: Path) -> Iterator[Server]:
    with Server(checkpoint) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    with serving(tiny_checkpoint) as started:
        yield started


Settings = Callable[..., ParallelSettings]


@pytest.fixture
def settings(server: Server) -> Settings:
    """Of an impatient client."""
    return lambda **changes: replace(
        ParallelSettings(server=server.address, num_retries=2, request_seconds=0.5), **changes
    )


@pytest.fixture
def policy(tiny_checkpoint: Path, settings: Settings) -> Iterator[RemotePolicy]:
    with open_policy(tiny_checkpoint, "remote", num_concurrent=4, parallel=settings()) as opened:
        assert isinstance(opened, RemotePolicy)
        yield opened


def requests_of(prompts: list[list[int]]) -> list[Request]:
    return [
        Request(request_id=str(number), prompt_ids=prompt, temperature=number % 2, seed=number)
        for number, prompt in enumerate(prompts)
    ]


def written(policy: RemotePolicy, sampling: Sampling = FREE) -> dict[str, Completion]:
    return {done.request_id: done for done in generate(policy, requests_of(PROMPTS), sampling)}


def test_each_prompt_gets_its_own_answer(policy: RemotePolicy, server: Server) -> None:
    found = written(policy)
    assert {name: done.token_ids for name, done in found.items()} == {
        str(number): prompt[::-1] for number, prompt in enumerate(PROMPTS)
    }
    assert all(done.is_finished and done.entropies is None for done in found.values())
    seeds = {len(body["prompt"]) - 4: body.get("seed") for body in server.bodies}
    assert seeds == {0: None, 1: 1, 2: None, 3: 3, 4: None, 5: 5}  # greedy needs none


def test_entropies_are_bounds_from_what_is_listed(policy: RemotePolicy, server: Server) -> None:
    found = written(policy, Sampling(with_entropies=True))
    bound = entropy_upper_bound(np.asarray([-0.5, -1.5]), len(server.tokenizer))
    for done in found.values():
        assert done.entropies is not None
        np.testing.assert_allclose(done.entropies, [bound] * len(done.token_ids), rtol=1e-6)
    assert {body["logprobs"] for body in server.bodies} == {20}


FAULTS = ("busy", "broken", "page", "other JSON", "lost", "cut off", "slow", "broken off")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_asked_through(policy: RemotePolicy, server: Server, fault: str) -> None:
    server.faults = [fault, fault]
    found = list(generate(policy, requests_of(PROMPTS[:1]), Sampling()))
    assert [done.token_ids for done in found] == [PROMPTS[0][::-1]]
    assert server.bodies == [server.bodies[0]] * 3  # the seed among them


REASONS = {
    "busy": "status 429: later",
    "broken": "status 500: engine died",
    "page": "no JSON but '<html>hello</html>'",
    "other JSON": "none to a completion",
    "slow": "longer than 0.5 s",
    "broken off": "reason 'abort'",
    "lost": "RemoteDisconnected",
    "cut off": "IncompleteRead",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_ends_the_run_with_its_reason(
    policy: RemotePolicy, server: Server, fault: str
) -> None:
    server.faults = [fault] * 3
    with pytest.raises(EngineFailure, match=REASONS[fault]) as raised:
        list(generate(policy, requests_of(PROMPTS[:1]), Sampling()))
    assert "asked 3 times" in str(raised.value)
    assert "run the same command again" in str(raised.value)
    assert len(server.bodies) == 3


def test_a_server_may_say_when_to_come_back(
    policy: RemotePolicy, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults = ["busy"]
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    start = time.perf_counter()
    list(generate(policy, requests_of(PROMPTS[:1]), Sampling()))
    assert time.perf_counter() - start >= 0.2


def test_answers_that_came_are_told_before_the_one_that_failed(
    tiny_checkpoint: Path, settings: Settings, server: Server
) -> None:
    server.faults = ["refused"]
    found = []
    alone = settings(num_retries=0)
    with open_policy(tiny_checkpoint, "remote", num_concurrent=1, parallel=alone) as policy:
        for request in requests_of(PROMPTS):
            policy.submit(request, Sampling())
        while len(server.bodies) < len(PROMPTS):
            time.sleep(0.02)
        time.sleep(0.2)
        found = policy.step()
        with pytest.raises(SettingError, match="status 400"):
            policy.step()
    assert len(found) == len(PROMPTS) - 1


def test_a_server_of_texts_alone_is_refused(policy: RemotePolicy, server: Server) -> None:
    server.faults = ["text alone"]
    with pytest.raises(SettingError, match=r"must return the ids.*`return_token_ids`.*vLLM"):
        list(generate(policy, requests_of(PROMPTS[:1]), Sampling()))
    assert len(server.bodies) == 1


def test_missing_log_probabilities_are_refused(policy: RemotePolicy, server: Server) -> None:
    server.faults = ["no logprobs"]
    with pytest.raises(SettingError, match="log-probabilities for each of its 4 units, got 0"):
        list(generate(policy, requests_of(PROMPTS[:1]), Sampling(with_entropies=True)))


def test_the_key_is_sent_and_never_shown(
    tiny_checkpoint: Path,
    settings: Settings,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MY_KEY", "very-secret")
    ours = settings(api_key_variable="MY_KEY")
    for fault, words in (("key", r"`api_key_variable`.*'MY_KEY' with a wrong"), ("refused", "400")):
        server.faults = [fault]
        with (
            open_policy(tiny_checkpoint, "remote", parallel=ours) as policy,
            pytest.raises(SettingError, match=words) as raised,
        ):
            list(generate(policy, requests_of(PROMPTS[:1]), Sampling()))
        assert "very-secret" not in str(raised.value)
    assert server.keys == {"Bearer very-secret"}
    assert "very-secret" not in "".join(capfd.readouterr())


def test_hanging_up_is_quick_and_leaves_the_policy_usable(
    tiny_checkpoint: Path, settings: Settings, server: Server
) -> None:
    server.faults = ["waiting"] * 4
    patient = settings(request_seconds=60)
    with open_policy(tiny_checkpoint, "remote", num_concurrent=4, parallel=patient) as policy:
        assert isinstance(policy, RemotePolicy)
        for request in requests_of(PROMPTS):
            policy.submit(request, Sampling())
        while server.faults:
            time.sleep(0.02)
        start = time.perf_counter()
        policy.abort()
        assert policy.step() == []
        assert len(written(policy)) == len(PROMPTS)
        assert time.perf_counter() - start < 15
    end = time.perf_counter() + 15
    while len(server.hung_up) < 4 and time.perf_counter() < end:
        time.sleep(0.02)
    assert server.hung_up == [b""] * 4


def test_a_server_that_is_down_is_told_of(tiny_checkpoint: Path, settings: Settings) -> None:
    with serving(tiny_checkpoint) as gone:
        address = gone.address
    with (
        pytest.raises(EngineFailure, match=rf"{address} must answer.*ConnectionRefused"),
        open_policy(tiny_checkpoint, "remote", parallel=settings(server=address)),
    ):
        pass


def test_no_server_at_all_is_told_of(tiny_checkpoint: Path, settings: Settings) -> None:
    with serving(tiny_checkpoint) as other:
        other.card = None  # type: ignore[assignment]
        opened = open_policy(tiny_checkpoint, "remote", parallel=settings(server=other.address))
        with pytest.raises(SettingError, match=r"`server` must be.*answers /v1/models"), opened:
            pass


def test_an_unknown_model_is_told_of(
    tiny_checkpoint: Path, settings: Settings, server: Server
) -> None:
    with (
        pytest.raises(SettingError, match=r"`served_model` must.*'tiny', got 'tinny'.*Did you"),
        open_policy(tiny_checkpoint, "remote", parallel=settings(served_model="tinny")),
    ):
        pass


def test_room_is_asked_for_before_work_begins(tiny_checkpoint: Path, settings: Settings) -> None:
    opened = open_policy(tiny_checkpoint, "remote", max_model_len=2100, parallel=settings())
    with pytest.raises(SettingError, match=r"got 2100 for 2048.*--max-model-len 2100"), opened:
        pass


def test_another_tokenizer_is_refused(
    tiny_checkpoint: Path, settings: Settings, server: Server
) -> None:
    other: Any = train_tiny_tokenizer()
    other.add_tokens(["x):\n"])
    server.tokenizer = other
    opened = open_policy(tiny_checkpoint, "remote", parallel=settings())
    with pytest.raises(SettingError, match=r"must have the model of .*'tiny', with"), opened:
        pass


def test_the_server_that_has_the_checkpoint_is_found_among_several(
    tiny_checkpoint: Path,
    settings: Settings,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = shutil.copytree(tiny_checkpoint, tmp_path / "changed")
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    server.card |= {"id": "a", "root": str(tiny_checkpoint)}
    with serving(changed) as second:
        second.card |= {"id": "b", "root": str(changed)}
        both = settings(server=(server.address, second.address))
        for checkpoint, name in ((tiny_checkpoint, "a"), (changed, "b")):
            with open_policy(checkpoint, "remote", parallel=both) as policy:
                assert policy.served.model == name  # type: ignore[attr-defined]
            assert "loaded from the same checkpoint" in capsys.readouterr().out
        # From a machine that shares no files they look alike.
        for one in (server, second):
            one.card["root"] = "/elsewhere"
        with (
            pytest.raises(SettingError, match=r"`served_model` must say which.*'a', 'b'"),
            open_policy(changed, "remote", parallel=both),
        ):
            pass
        named = replace(both, served_model="b")
        with open_policy(changed, "remote", parallel=named) as policy:
            assert policy.served.server.address == second.address  # type: ignore[attr-defined]
        assert "weights cannot be seen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "remote"}, "`evaluation.server` and `evaluation.engine: remote` need"),
        ({"server": "http://a:1"}, "need each other"),
        ({"engine": "remote", "server": "a:1"}, "must be an address such as"),
        ({"engine": "remote", "server": ("http://a", "ftp://b")}, "got 'ftp://b'"),
        ({"engine": "remote", "server": "http://me:key@a"}, "no user or password"),
        (
            {"engine": "remote", "server": "http://a", "data_parallel_size": 2},
            "where it is started",
        ),
        ({"engine": "remote", "server": "http://a", "num_retries": -1}, "num_retries` must"),
        ({"engine": "remote", "server": "http://a", "request_seconds": 0}, "request_seconds` must"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words) as raised:
        EvaluationSettings(**options)
    assert "key@" not in str(raised.value)


def test_addresses_may_end_as_users_write_them() -> None:
    options = ("http://a:1/", "http://a:1/v1", "http://a:1/v1/", "http://a:1")
    assert set(RolloutSettings(engine="remote", server=options).servers) == {"http://a:1"}


def test_an_evaluation_goes_on_where_the_server_has_moved(
    tiny_checkpoint: Path, server: Server, settings: Settings
) -> None:
    evaluation = EvaluationSettings(engine="remote", server=server.address)
    with open_engine(evaluation) as engine:
        assert engine.serve(tiny_checkpoint) is engine.serve(tiny_checkpoint)
    assert server.bodies[0]["max_tokens"] == 8  # it warmed up
    course = Course(benchmark=load_benchmark("humaneval"), identity="humaneval")
    method = Method(label="vanilla", agent=Vanilla(), checkpoint=tiny_checkpoint)
    moved = replace(evaluation, server=("https://elsewhere:1",), num_retries=1)
    signatures = [_signature(method, course, [], each) for each in (evaluation, moved)]
    assert signatures[0] == signatures[1]
