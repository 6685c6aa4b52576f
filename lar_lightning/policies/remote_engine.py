"""An engine on another machine: any server of vLLM's OpenAI API, with no code of ours in it.

Agents keep what a policy wrote as the units that it wrote, and so the server must take prompts of
token ids and return the ids that it generates (`return_token_ids`, which vLLM knows). A server of
texts alone cannot do: the text does not tell which units it came from.
"""

import json
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lar_lightning.errors import SettingError
from lar_lightning.policies.policy import Completion, Request, Sampling, entropy_upper_bound
from lar_lightning.policies.remote_models import Served, find_served
from lar_lightning.policies.remote_server import NoAnswer, RemoteServer, Round
from lar_lightning.policies.vllm_engine import NUM_LOG_PROBABILITIES
from lar_lightning.settings import RemoteSettings

STEP_SECONDS = 0.05
"""Longest wait of a step; environments are looked after between steps."""
UNCHANGED = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sampling from the model's own distribution. Named in each request, since a server takes what is
left out from the checkpoint's generation config, of which engines in process take nothing."""


class RemotePolicy:
    """A served model; see `Policy`."""

    entropy_kind = f"upper bound from top-{NUM_LOG_PROBABILITIES}"

    def __init__(self, served: Served, vocabulary_size: int, num_concurrent: int) -> None:
        """Set up threads, one for each request that is decoded at a time."""
        self.served = served
        self.vocabulary_size = vocabulary_size
        self._threads = ThreadPoolExecutor(num_concurrent, thread_name_prefix="remote")
        self._round = Round()
        self._unfinished: set[Future[Completion]] = set()

    def submit(self, request: Request, sampling: Sampling) -> None:
        """Send a request as soon as a thread is free."""
        server: RemoteServer = self.served.server
        future = self._threads.submit(
            server.ask,
            "/v1/completions",
            body_of(self.served.model, request, sampling),
            round=self._round,
            reading=partial(self._read, request, sampling),
        )
        self._unfinished.add(future)

    def step(self) -> list[Completion]:
        """Wait a moment for answers; one that failed is told of after those that came."""
        if not self._unfinished:
            return []
        ended, _ = wait(self._unfinished, STEP_SECONDS, FIRST_COMPLETED)
        answered = {future for future in ended if future.exception() is None}
        if ended and not answered:
            return [ended.pop().result()]  # raises
        self._unfinished -= answered
        return [future.result() for future in answered]

    def abort(self) -> None:
        """Hang up, on which the server forgets the requests."""
        self._round.end()
        for future in self._unfinished:
            future.cancel()
        self._unfinished.clear()
        self._round = Round()

    def close(self) -> None:
        """Hang up for good."""
        self.abort()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _read(self, request: Request, sampling: Sampling, answer: Any) -> Completion:
        try:
            choice = answer["choices"][0]
            reason, token_ids = choice["finish_reason"], choice.get("token_ids")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise NoAnswer(f"its answer is none to a completion: {str(answer)[:100]!r}") from error
        if reason not in ("stop", "length"):  # it was ended in the midst of its work
            raise NoAnswer(f"it broke off, for the reason {reason!r}")
        if not isinstance(token_ids, list) or not all(isinstance(unit, int) for unit in token_ids):
            raise SettingError(
                f"`server` must return the ids of what it generates (`return_token_ids`), got none "
                f"from {self.served.server.address}. Servers of vLLM do."
            )
        entropies = None
        if sampling.with_entropies:
            positions = (choice.get("logprobs") or {}).get("top_logprobs") or []
            if len(positions) != len(token_ids):
                raise SettingError(
                    f"`server` must return log-probabilities for each of its {len(token_ids)} "
                    f"units, got {len(positions)} from {self.served.server.address}. Rollouts "
                    "need them; evaluations do not."
                )
            entropies = np.asarray(
                [
                    entropy_upper_bound(np.asarray(list(listed.values())), self.vocabulary_size)
                    for listed in positions
                ],
                dtype=np.float32,
            )
        return Completion(
            request_id=request.request_id,
            token_ids=token_ids,
            is_finished=reason == "stop",
            entropies=entropies,
        )


def body_of(model: str, request: Request, sampling: Sampling) -> dict[str, Any]:
    """Return what a server is sent, to do what an engine in process does."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(map(int, request.prompt_ids)),
        "max_tokens": sampling.max_tokens,
        "temperature": request.temperature,
        "return_token_ids": True,
        **UNCHANGED,
    }
    if request.temperature > 0:
        body["seed"] = request.seed
    if sampling.stops:
        body |= {"stop": list(sampling.stops), "include_stop_str_in_output": True}
    if sampling.with_entropies:
        # Two tokens may have one text, and keys must differ.
        body |= {"logprobs": NUM_LOG_PROBABILITIES, "return_tokens_as_token_ids": True}
    return body


@contextmanager
def open_remote(
    checkpoint: Path, *, num_concurrent: int, max_model_len: int, settings: RemoteSettings
) -> Iterator[RemotePolicy]:
    """Find the server that has a checkpoint, and hang up afterwards.

    Raises:
        SettingError: if none has it, or has room for `max_model_len` units.
    """
    served = find_served(checkpoint, max_model_len, settings)
    print(
        f"engine: model {served.model!r} on {served.server.address} ({served.evidence})", flush=True
    )
    policy = RemotePolicy(served, _vocabulary_size(checkpoint), num_concurrent)
    try:
        yield policy
    finally:
        policy.close()


def _vocabulary_size(checkpoint: Path) -> int:
    content = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return int(content.get("vocab_size") or content["text_config"]["vocab_size"])
