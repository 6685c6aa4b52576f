"""A server that is asked over HTTP, with patience where it is busy, broken or gone.

What can be asked again is asked again, after pauses that double: 408, 425, 429 and 5xx, lost
connections, waits that were too long, and answers that are none. All else is told at once. Requests
name their seeds, so that a second answer is the first one's equal.
"""

import http.client
import json
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lar_lightning.errors import EngineFailure, SettingError
from lar_lightning.settings import RemoteSettings

CONNECT_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 30.0
LONGEST_ASKED_PAUSE_SECONDS = 120.0
"""Where a server says itself when to come back."""
TEMPORARY = frozenset({408, 425, 429})
MAX_WORDS = 300


class NoAnswer(Exception):
    """Nothing that can be used, this time."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        """Say why; `pause` is what the server asks for, in seconds."""
        super().__init__(reason)
        self.pause = pause


class Abandoned(Exception):
    """Nobody waits for the answer any more."""


class Missing(SettingError):
    """The server has no such thing."""


@dataclass(eq=False)
class Round:
    """Requests that are given up together."""

    is_over: threading.Event = field(default_factory=threading.Event)
    _connections: set[http.client.HTTPConnection] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def holding(self, connection: http.client.HTTPConnection) -> Iterator[None]:
        """Close a connection afterwards, or at once when the round is over."""
        with self._lock:
            self._connections.add(connection)
        try:
            if self.is_over.is_set():
                raise Abandoned
            yield
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def end(self) -> None:
        """Give up; servers stop working for a client that has hung up."""
        self.is_over.set()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError, AttributeError):  # not connected, or not any more
                    connection.sock.shutdown(socket.SHUT_RDWR)


class RemoteServer:
    """One server; many threads may ask it at once."""

    def __init__(self, address: str, settings: RemoteSettings) -> None:
        """Remember where it is; nothing is asked yet."""
        self.address = address
        self.settings = settings
        self._parts = urlsplit(address)
        self._key = os.environ.get(settings.api_key_variable, "")

    def ask(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        round: Round | None = None,
        num_retries: int | None = None,
        reading: Callable[[Any], Any] = lambda answer: answer,
    ) -> Any:
        """Return what the server answers: to a POST of `body`, or to a GET.

        Args:
            path: Below the server's address.
            body: What is sent, as JSON.
            round: Whose end gives up this request too.
            num_retries: Instead of the settings' own.
            reading: Makes something of the answer, or raises `NoAnswer` to have it asked for again.

        Raises:
            SettingError: if the server refuses what it is asked.
            EngineFailure: if it gives no answer, however often it is asked.
        """
        round = round or Round()
        retries = self.settings.num_retries if num_retries is None else num_retries
        for attempt in range(retries + 1):
            try:
                return reading(self._ask_once(path, body, round))
            except NoAnswer as error:
                if attempt == retries:
                    times = "once" if attempt == 0 else f"{attempt + 1} times"
                    raise EngineFailure(
                        f"the server {self.address} must answer, but asked {times} for {path} it "
                        f"did not: {error}. What was finished is kept: start the server, or check "
                        "`server`, and run the same command again."
                    ) from error
                pause = min(2.0 ** (attempt - 1), LONGEST_PAUSE_SECONDS)
                # Many wait for the same server, and are not to come back in the same moment.
                pause = max(pause * random.uniform(0.75, 1.0), error.pause)
                if round.is_over.wait(pause):
                    raise Abandoned from None
        raise AssertionError("the last attempt returns or raises")

    def _ask_once(self, path: str, body: dict[str, Any] | None, round: Round) -> Any:
        secure = self._parts.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        host = self._parts.hostname or ""
        connection = connect(host, self._parts.port, timeout=CONNECT_SECONDS)
        headers = {"Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        with round.holding(connection):
            try:
                connection.connect()
                connection.sock.settimeout(self.settings.request_seconds)
                method = "GET" if content is None else "POST"
                connection.request(method, self._parts.path + path, content, headers)
                response = connection.getresponse()
                payload = response.read()
            except TimeoutError as error:
                if round.is_over.is_set():
                    raise Abandoned from error
                seconds = self.settings.request_seconds
                raise NoAnswer(f"it took longer than {seconds:g} s (`request_seconds`)") from error
            except (OSError, http.client.HTTPException) as error:
                if round.is_over.is_set():
                    raise Abandoned from error
                raise NoAnswer(f"{type(error).__name__}: {error}") from error
        if response.status == 200:
            try:
                return json.loads(payload)
            except ValueError as error:
                raise NoAnswer(f"it answered no JSON but {self._words(payload)!r}") from error
        raise self._refusal(path, response, payload)

    def _refusal(self, path: str, response: http.client.HTTPResponse, payload: bytes) -> Exception:
        status, words = response.status, self._words(payload)
        if status in TEMPORARY or status >= 500:
            return NoAnswer(f"status {status}: {words}", pause=_asked_pause(response))
        if status in (401, 403):
            state = "a wrong one" if self._key else "none"
            return SettingError(
                f"`api_key_variable` must name an environment variable with the key of "
                f"{self.address}, got {self.settings.api_key_variable!r} with {state} (status "
                f"{status})."
            )
        if status in (404, 405):
            return Missing(
                f"`server` must have {path} and the model, but {self.address} answers with status "
                f"{status}: {words}."
            )
        return SettingError(
            f"`server` must take the requests of agents, but {self.address} answers {path} with "
            f"status {status}: {words}."
        )

    def _words(self, payload: bytes) -> str:
        """Return the message in an answer, short and without the key."""
        text = payload.decode(errors="replace")
        with suppress(ValueError, TypeError, KeyError):
            content = json.loads(text)
            text = str(content.get("error", content).get("message", text))
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:MAX_WORDS]


def _asked_pause(response: http.client.HTTPResponse) -> float:
    try:
        asked = float(response.getheader("Retry-After") or 0)
    except ValueError:  # a date
        return 0.0
    return min(max(asked, 0.0), LONGEST_ASKED_PAUSE_SECONDS)
