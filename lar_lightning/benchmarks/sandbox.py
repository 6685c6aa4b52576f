"""Run model-written Python, which must be taken for hostile, in a process that is shut in.

The work is done by `sandbox_launcher.py`, a script started in a fresh interpreter: the parent may
hold threads, CUDA contexts and secrets, so it only ever does a plain spawn, never a fork that runs
Python. What the machine does not allow is listed by `isolation_report`; nothing is silently weaker.

Not defended from: bugs of the kernel, other processes' timing, and memory beyond
`memory_gib * num_processes` in total (there is no limit per group of processes without cgroups).
"""

import dataclasses
import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

REPORT_FD = 3
"""Descriptor on which the program may write a report, apart from its output."""

MAX_REPORT_BYTES = 4096
MAX_STATUS_BYTES = 65536
STARTUP_ALLOWANCE_SECONDS = 30.0

_LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
_GAP_SENTENCES = {
    "files": "Files are open to the code as they are to this user: the kernel offers neither "
    "mount namespaces nor Landlock.",
    "network": "The network is open to the code: the kernel offers neither network namespaces "
    "nor Landlock 4 (Linux 6.7).",
    "datagrams": "The network is open to the code for all but TCP: network namespaces are "
    "forbidden and Landlock covers TCP only.",
    "unix_sockets": "Unix sockets in the file system are open to the code where this user may "
    "connect: mount namespaces are forbidden.",
    "signals": "Signals to other processes of this user are open to the code: the kernel offers "
    "neither PID namespaces nor Landlock 6 (Linux 6.12).",
    "processes": "Processes of the code may survive a run in which it kills its supervisor: PID "
    "namespaces are forbidden.",
    "process_limit": "The limit on processes does not bind: this is root and it may not become "
    "another user.",
}


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """What one program may use."""

    wall_seconds: float = 5.0
    """Time from start to end, in seconds."""

    cpu_seconds: float = 5.0
    """Processor time of each process, in seconds, rounded up to whole ones."""

    memory_gib: float = 1.0
    """Address space of each process, in GiB."""

    disk_mib: int = 64
    """Size of each file, and of the working folder where mount namespaces are allowed, in MiB."""

    num_open_files: int = 64
    """Open descriptors of each process."""

    num_processes: int = 16
    """Processes and threads at once, the program itself included."""

    output_kib: int = 64
    """Output that is kept, standard output and error together, in KiB; the rest is dropped."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(
                    f"`{field.name}` must be positive, got {value!r}. "
                    f"Leave it out for the default of {field.default!r}."
                )


@dataclass(frozen=True, kw_only=True)
class SandboxResult:
    """How one program ended."""

    is_finished: bool
    """Whether the program ended by itself, with whatever exit status."""

    returncode: int
    """Exit status, or the negative number of the signal that killed the program."""

    output: str
    """Standard output and error together, up to the limit."""

    report: bytes
    """What the program wrote to descriptor `REPORT_FD`, up to 4096 bytes."""

    seconds: float
    """Time from start to end, without the start-up of the sandbox."""

    timed_out: bool
    """Whether the program was killed for reaching a time limit, wall or processor."""


def run_python(source: str, limits: SandboxLimits, stdin: bytes = b"") -> SandboxResult:
    """Run `source` in a shut-in interpreter (isolated mode, standard library only).

    Safe to call from several threads at once; each call has a folder and processes of its own.

    Raises:
        RuntimeError: If the sandbox itself does not work, as opposed to the program in it.
    """
    isolation_report()
    return _run(source, limits, stdin)[0]


def isolation_report() -> tuple[str, ...]:
    """Say in sentences what cannot be isolated on this machine; found out once per process."""
    with _PROBE_LOCK:
        return _probe()


_PROBE_LOCK = threading.Lock()


@functools.cache
def _probe() -> tuple[str, ...]:
    generous = SandboxLimits(wall_seconds=60.0, cpu_seconds=60.0)
    result, gaps = _run("print('ready')", generous, b"")
    if result.output != "ready\n" or result.returncode != 0:
        raise RuntimeError(
            f"The sandbox cannot run Python here: exit status {result.returncode}, output "
            f"{result.output!r}. Model-written code is never run outside of it; check that "
            f"{os.path.realpath(sys.executable)!r} runs with `-I -S` and an empty environment."
        )
    return tuple(_GAP_SENTENCES[gap] for gap in gaps)


def _run(source: str, limits: SandboxLimits, stdin: bytes) -> tuple[SandboxResult, list[str]]:
    """Run `source` and return its result and the names of the gaps in its isolation."""
    base = os.path.realpath(tempfile.mkdtemp(prefix="sandbox-"))
    try:
        # Others may pass but not list: the program runs as a user of its own.
        os.chmod(base, 0o711)
        os.mkdir(f"{base}/work", 0o700)
        Path(base, "program.py").write_text(source, encoding="utf-8", errors="surrogatepass")
        os.chmod(f"{base}/program.py", 0o644)
        streams = _launch(base, limits, stdin)
    finally:
        _remove(base)
    messages = [json.loads(line) for line in streams["status"].splitlines()]
    facts = {key: value for message in messages for key, value in message.items()}
    output = streams["output"].decode(errors="replace")
    if "error" in facts or "gaps" not in facts:
        raise RuntimeError(
            "The sandbox failed before it could start the program; model-written code is never "
            f"run outside of it.\n{facts.get('error', output)}"
        )
    timed_out = facts.get("timed_out", False)
    result = SandboxResult(
        is_finished="returncode" in facts and not timed_out and facts["returncode"] >= 0,
        returncode=facts.get("returncode", -signal.SIGKILL),
        output=output,
        report=bytes(streams["report"]),
        seconds=facts.get("seconds", limits.wall_seconds),
        timed_out=timed_out,
    )
    return result, facts["gaps"]


def _launch(base: str, limits: SandboxLimits, stdin: bytes) -> dict[str, bytearray]:
    """Start the launcher and return what came over its three pipes once it has ended."""
    report_fd, report_writer = os.pipe()
    status_fd, status_writer = os.pipe()
    config = dataclasses.asdict(limits) | {"base": base}
    config |= {"report_fd": report_writer, "status_fd": status_writer}
    work = f"{base}/work"
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": work, "TMPDIR": work}
    executable = os.path.realpath(sys.executable)
    try:
        process = subprocess.Popen(
            [executable, "-I", "-S", "-B", str(_LAUNCHER), json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(report_writer, status_writer),
            env=environment,
            cwd=work,
            start_new_session=True,
        )
    except BaseException:
        os.close(report_fd)
        os.close(status_fd)
        raise
    finally:
        os.close(report_writer)
        os.close(status_writer)
    assert process.stdin is not None
    assert process.stdout is not None
    readers = {
        "output": (process.stdout, limits.output_kib * 1024),
        "report": (os.fdopen(report_fd, "rb", buffering=0), MAX_REPORT_BYTES),
        "status": (os.fdopen(status_fd, "rb", buffering=0), MAX_STATUS_BYTES),
    }
    try:
        deadline = time.monotonic() + limits.wall_seconds + STARTUP_ALLOWANCE_SECONDS
        return _exchange(readers, process.stdin, stdin, deadline)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, *(reader for reader, _ in readers.values())):
            stream.close()


def _exchange(
    readers: dict[str, tuple[IO[bytes], int]], writer: IO[bytes], data: bytes, deadline: float
) -> dict[str, bytearray]:
    """Feed `data` and read all pipes until the launcher closes its status or time is up."""
    kept = {name: bytearray() for name in readers}
    with selectors.DefaultSelector() as selector:
        for name, (reader, _) in readers.items():
            os.set_blocking(reader.fileno(), False)
            selector.register(reader, selectors.EVENT_READ, name)
        os.set_blocking(writer.fileno(), False)
        selector.register(writer, selectors.EVENT_WRITE, "stdin")
        while readers["status"][0] in selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(timeout=1.0):
                if key.data == "stdin":
                    data = _write_some(key.fd, data)
                    if not data:
                        selector.unregister(writer)
                        writer.close()
                elif _read_some(key.fd, kept[key.data], readers[key.data][1]) == 0:
                    selector.unregister(key.fileobj)
    for name, (reader, limit) in readers.items():
        # Bounded by the limit: where processes can escape, one may print forever.
        while len(kept[name]) < limit and _read_some(reader.fileno(), kept[name], limit) > 0:
            pass
    return kept


def _read_some(fd: int, kept: bytearray, limit: int) -> int:
    """Read what is there, keep it up to `limit`; 0 at the end, -1 where nothing is there."""
    try:
        chunk = os.read(fd, 65536)
    except BlockingIOError:
        return -1
    kept += chunk[: limit - len(kept)]
    return len(chunk)


def _write_some(fd: int, data: bytes) -> bytes:
    """Write what fits into the pipe and return the rest; nothing once nobody reads."""
    try:
        return data[os.write(fd, data[:65536]) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return b""


def _remove(base: str) -> None:
    """Remove the folder of a run, whatever the program made of it."""
    if os.listdir(f"{base}/work"):
        # Without mount namespaces: shutil recurses, and the program chooses depth and modes.
        subprocess.run(["chmod", "-R", "u+rwX", "--", base], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["rm", "-rf", "--", base], stderr=subprocess.DEVNULL, check=False)
    else:
        shutil.rmtree(base)
