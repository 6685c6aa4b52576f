"""Stock vLLM servers as processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 600.0
STOP_SECONDS = 30.0


def free_port() -> int:
    """Return a port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(eq=False, kw_only=True)
class VllmServer:
    """A server that was started."""

    port: int
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Return when it takes requests."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
                return
            time.sleep(0.2)
        words = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"the vLLM server did not start:\n{words}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the server and to the engine that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        self.send(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        self.send(signal.SIGKILL)
        self.process.wait()


def start_server(
    checkpoint: Path,
    log: Path,
    options: Sequence[str] = (),
    *,
    port: int = 0,
    environment: Mapping[str, str] | None = None,
) -> VllmServer:
    """Start a server without waiting for it."""
    port = port or free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), *options]
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**variables, **os.environ, **(environment or {})},
            start_new_session=True,
        )
    return VllmServer(port=port, process=process, log=log)


@contextmanager
def vllm_server(checkpoint: Path, log: Path, options: Sequence[str] = ()) -> Iterator[VllmServer]:
    """Have a server for a while."""
    server = start_server(checkpoint, log, options)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def speculation(num_tokens: int = 4) -> list[str]:
    """Return the options for n-gram speculative decoding."""
    content = {
        "method": "ngram",
        "num_speculative_tokens": num_tokens,
        "prompt_lookup_max": num_tokens,
        "prompt_lookup_min": 2,
    }
    return ["--speculative-config", json.dumps(content)]
