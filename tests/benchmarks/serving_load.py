"""What a client of a server sees of its speed: streamed answers to chats, several at a time."""

import http.client
import json
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lar_lightning.segments import LatentVocabulary

TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One answer that is asked for, greedily."""

    messages: tuple[dict[str, str], ...]
    max_units: int
    """Most units of the answer; exactly as many where the length is forced."""
    num_expanded: int | None = None
    """Expanded tokens that a forced answer counts as; None: it ends by itself and is counted."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One answer."""

    num_prompt_units: int
    units: tuple[int, ...]
    num_expanded: int
    first_seconds: float
    """Until the first unit is there."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Load:
    """All answers of a run."""

    wall_seconds: float
    answers: tuple[Timed, ...]
    """In the order of the jobs."""


def run_load(
    address: str, jobs: Sequence[Job], concurrency: int, vocabulary: LatentVocabulary
) -> Load:
    """Ask a server for all answers, `concurrency` at a time."""
    waiting = deque(enumerate(jobs))
    answers: dict[int, Timed] = {}
    errors: list[Exception] = []

    def work() -> None:
        while not errors:
            try:
                number, job = waiting.popleft()
            except IndexError:
                return
            try:
                answers[number] = ask(address, job, vocabulary)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(concurrency)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if errors:
        raise errors[0]
    return Load(wall_seconds=seconds, answers=tuple(answers[number] for number in range(len(jobs))))


def ask(address: str, job: Job, vocabulary: LatentVocabulary) -> Timed:
    """Return one streamed answer with its times."""
    is_forced = job.num_expanded is not None
    body = {
        "model": "model",
        "messages": job.messages,
        "chat_template_kwargs": {"enable_thinking": False},
        "max_tokens": job.max_units,
        "ignore_eos": is_forced,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(
        parts.hostname or "", parts.port, timeout=TIMEOUT_SECONDS
    )
    start = time.perf_counter()
    try:
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read(500)!r}")
        units: list[int] = []
        usage: dict[str, Any] = {}
        first = 0.0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                written = choice.get("token_ids") or ()
                if written and not units:
                    first = time.perf_counter() - start
                units.extend(written)
        seconds = time.perf_counter() - start
    finally:
        connection.close()
    if usage.get("completion_tokens") != len(units):
        raise RuntimeError(f"{len(units)} units came, the server counts {usage}")
    if is_forced and len(units) != job.max_units:
        raise RuntimeError(f"{len(units)} units came where {job.max_units} were to")
    expanded = job.num_expanded if job.num_expanded is not None else sum(vocabulary.lengths(units))
    return Timed(
        num_prompt_units=usage["prompt_tokens"],
        units=tuple(units),
        num_expanded=expanded,
        first_seconds=first,
        seconds=seconds,
    )
