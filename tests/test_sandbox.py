import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lar_lightning.benchmarks.sandbox import SandboxLimits, isolation_report, run_python

SHORT = SandboxLimits(wall_seconds=1.5, cpu_seconds=10.0)
SMALL = SandboxLimits(memory_gib=0.25, disk_mib=4, num_processes=5, num_open_files=20)
FREE = SandboxLimits(wall_seconds=20.0, cpu_seconds=20.0)

# Run in an interpreter whose kernel refuses `unshare`, as containers without namespaces do.
RUN_WITHOUT_NAMESPACES = """
import ctypes, dataclasses, json, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
number = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
if os.geteuid() != 0:
    assert libc.prctl(38, 1, 0, 0, 0) == 0
header = struct.pack("HP", len(rules), ctypes.addressof(code))
assert libc.prctl(22, 2, header, 0, 0) == 0, "no seccomp"
from lar_lightning.benchmarks.sandbox import SandboxLimits, isolation_report, run_python
source = sys.stdin.read()
result = dataclasses.asdict(run_python(source, SandboxLimits(wall_seconds=5.0)))
result["report"] = result["report"].decode()
print(json.dumps([result, isolation_report()]))
"""


@pytest.fixture
def marker() -> str:
    """An argument by which a process of this test is found among all of the machine."""
    return f"sandbox-test-{uuid.uuid4().hex}"


def has_gap(word: str) -> bool:
    return any(word in sentence for sentence in isolation_report())


def is_alive(marker: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker in path.read_bytes().decode(errors="replace"):
                return True
        except OSError:
            continue
    return False


def run_without_namespaces(source: str) -> tuple[dict, list[str]]:
    result = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT_NAMESPACES],
        input=textwrap.dedent(source),
        capture_output=True,
        text=True,
    )
    if "no seccomp" in result.stderr:
        pytest.skip("this kernel does not let the test forbid namespaces")
    assert result.returncode == 0, result.stderr
    return tuple(json.loads(result.stdout))


def daemon_source(marker: str, last_line: str = "") -> str:
    """Leave a double-forked child in a session of its own, recognisable by its arguments."""
    return textwrap.dedent(f"""
        import os, sys, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for fd in range(4):
                    os.close(fd)
                os.execv(sys.executable, [sys.executable, "-I", "-S", "-c",
                                          "import time; time.sleep(600)", "{marker}"])
            os._exit(0)
        os.wait()
        time.sleep(0.3)
        print("left")
    """) + (last_line)


def test_output_report_and_exit_status_come_back():
    source = (
        "import os, sys\nprint(input())\nprint('e', file=sys.stderr)\nos.write(3, b'r')\nexit_ = 7"
    )
    result = run_python(source + "\nsys.exit(exit_)", FREE, stdin=b"hello\n")
    assert (result.is_finished, result.timed_out, result.returncode) == (True, False, 7)
    assert sorted(result.output.split()) == ["e", "hello"]
    assert result.report == b"r"
    assert 0 < result.seconds < 20


def test_more_input_than_a_pipe_holds_arrives():
    data = os.urandom(500_000)
    result = run_python("import sys; print(len(sys.stdin.buffer.read()))", FREE, stdin=data)
    assert result.output == "500000\n"


def test_input_that_nobody_reads_does_no_harm():
    assert run_python("", FREE, stdin=bytes(10**6)).is_finished


def test_exception_is_a_finished_run_with_its_traceback():
    result = run_python("assert 1 == 2, 'reason'", FREE)
    assert (result.is_finished, result.returncode) == (True, 1)
    assert result.output.endswith("AssertionError: reason\n")


def test_infinite_loop_is_stopped_at_the_wall_limit():
    result = run_python("while True: pass", SHORT)
    assert (result.timed_out, result.is_finished) == (True, False)
    assert 1.5 <= result.seconds < 4


def test_infinite_loop_is_stopped_at_the_processor_limit():
    limits = SandboxLimits(wall_seconds=30.0, cpu_seconds=1.0)
    result = run_python("while True: pass", limits)
    assert (result.timed_out, result.is_finished) == (True, False)
    assert result.seconds < 20


def test_ignoring_the_processor_limit_is_a_timeout_too():
    source = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    result = run_python(source, SandboxLimits(wall_seconds=30.0, cpu_seconds=1.0))
    assert (result.timed_out, result.returncode) == (True, -9)


def test_program_that_ignores_signals_is_stopped():
    source = (
        "import signal, time\n"
        "for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(number, signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    result = run_python(source, SHORT)
    assert (result.timed_out, result.output) == (True, "ready\n")


def test_printing_forever_keeps_the_first_kibibytes_only():
    limits = SandboxLimits(wall_seconds=1.5, output_kib=4)
    result = run_python("while True: print('x' * 1000)", limits)
    assert result.timed_out
    assert len(result.output) == 4096


def test_memory_bomb_ends_in_a_memory_error():
    result = run_python("data = bytearray(2**29)", SMALL)
    assert result.output.endswith("MemoryError\n")


def test_fork_bomb_stays_within_the_process_limit_and_dies(marker):
    source = """
        import os, sys, time
        if len(sys.argv) == 1:
            code = open("../program.py").read()
            os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", code, "MARKER"])
        num_started = 0
        try:
            while num_started < 500:
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
                num_started += 1
        except OSError:
            print(num_started, flush=True)
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """
    limits = SandboxLimits(wall_seconds=1.5, num_processes=5)
    result = run_python(textwrap.dedent(source).replace("MARKER", marker), limits)
    assert result.timed_out
    assert int(result.output.splitlines()[0]) <= 4
    assert not is_alive(marker)


def test_open_files_are_limited():
    result = run_python("files = [open('/dev/null') for _ in range(100)]", SMALL)
    assert "Too many open files" in result.output


def test_big_file_is_refused():
    source = "file = open('big', 'wb')\nfor _ in range(8): file.write(bytes(2**20)); file.flush()"
    assert "File too large" in run_python(source, SMALL).output


def test_many_files_fill_the_working_folder_only():
    if has_gap("mount namespaces"):
        pytest.skip("the working folder has no size without mount namespaces")
    source = "for i in range(4): open(str(i), 'wb').write(bytes(2 * 2**20))"
    assert "No space left" in run_python(source, SMALL).output


def test_working_folder_is_empty_home_and_temporary_and_gone_afterwards():
    source = """
        import os, pathlib, tempfile
        assert os.listdir() == []
        assert os.getcwd() == os.environ["HOME"] == tempfile.gettempdir()
        pathlib.Path("a/b").mkdir(parents=True)
        pathlib.Path("a/b/c").write_text("text")
        os.chmod("a/b", 0)
        print(os.getcwd())
    """
    result = run_python(textwrap.dedent(source), FREE)
    assert result.returncode == 0, result.output
    assert not Path(result.output.strip()).parent.exists()


def test_files_outside_the_working_folder_cannot_be_written(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    places = [
        tmp_path,
        Path(__file__).parent,
        Path.home(),
        Path("/tmp"),
        Path("/dev/shm"),
        Path("/"),
    ]
    source = f"""
        import os
        for path in {[str(place / "sandbox-was-here") for place in places] + [str(victim)]}:
            try:
                open(path, "a").write("x")
                print("wrote", path)
            except OSError:
                pass
        try:
            os.remove({str(victim)!r})
            print("removed")
        except OSError:
            pass
    """
    result = run_python(textwrap.dedent(source), FREE)
    assert (result.returncode, result.output) == (0, "")
    assert victim.read_text() == "whole"


def test_files_outside_the_system_cannot_be_read(tmp_path):
    tmp_path.chmod(0o777)
    (tmp_path / "secret").write_text("secret")
    for path in (tmp_path / "secret", Path(__file__), Path("/etc/passwd"), Path("/proc/1/environ")):
        result = run_python(f"print(open({str(path)!r}).read())", FREE)
        assert result.returncode == 1, (path, result.output)


def test_secrets_of_the_environment_are_out_of_reach(monkeypatch):
    monkeypatch.setenv("SANDBOX_TEST_TOKEN", "a-secret")
    source = f"""
        import os
        print(sorted(os.environ))
        for pid in (os.getppid(), {os.getpid()}, 1):
            try:
                print(open(f"/proc/{{pid}}/environ").read())
            except OSError:
                pass
    """
    result = run_python(textwrap.dedent(source), FREE)
    assert result.output == "['HOME', 'LANG', 'PATH', 'TMPDIR']\n"


def test_descriptors_of_the_parent_are_closed(tmp_path):
    with open(tmp_path / "secret", "w+") as file:
        os.set_inheritable(file.fileno(), True)
        result = run_python(f"import os\nos.fstat({file.fileno()})", FREE)
    assert "Bad file descriptor" in result.output


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
def test_local_listener_cannot_be_reached(kind):
    if has_gap("network is open"):
        pytest.skip("isolation_report lists the network")
    with socket.socket(socket.AF_INET, getattr(socket, kind)) as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "SOCK_STREAM":
            listener.listen()
        source = f"""
            import socket
            client = socket.socket(socket.AF_INET, socket.{kind})
            client.connect(("127.0.0.1", {listener.getsockname()[1]}))
            client.send(b"x")
        """
        result = run_python(textwrap.dedent(source), FREE)
    assert result.returncode == 1
    assert "Permission denied" in result.output or "unreachable" in result.output


def test_daemonised_child_is_dead_afterwards(marker):
    result = run_python(daemon_source(marker), FREE)
    assert (result.is_finished, result.output) == (True, "left\n")
    assert not is_alive(marker)


def test_daemonised_child_is_dead_after_a_timeout(marker):
    source = daemon_source(marker, "sys.stdout.flush(); time.sleep(600)")
    result = run_python(source, SandboxLimits(wall_seconds=3.0))
    assert (result.timed_out, result.output) == (True, "left\n")
    assert not is_alive(marker)


@pytest.mark.parametrize(
    "target",
    ["os.getppid()", str(os.getpid()), "-1", "0"],
    ids=["parent", "test", "all", "own group"],  # alike in all processes that run tests
)
def test_signals_do_not_reach_the_parent(target):
    result = run_python(f"import os, time\nos.kill({target}, 9)\ntime.sleep(0.1)", FREE)
    # Pid 0 is the program's own group; the others are refused or not there.
    assert result.returncode == (-9 if target == "0" else 1), result.output
    assert not result.timed_out


@pytest.mark.parametrize("call", ["sys.exit(0)", "os._exit(0)"])
def test_early_exit_leaves_no_report(call):
    result = run_python(f"import os, sys\n{call}\nos.write(3, b'token')", FREE)
    assert (result.is_finished, result.returncode, result.report) == (True, 0, b"")


def test_privileges_are_gone_for_good():
    source = """
        import ctypes, os
        libc = ctypes.CDLL(None)
        print(os.getuid() != 0, libc.prctl(39, 0, 0, 0, 0))
        for call in (lambda: os.setuid(0), lambda: os.chroot("."), lambda: os.nice(-5)):
            try:
                call()
                print("allowed")
            except PermissionError:
                pass
    """
    result = run_python(textwrap.dedent(source), FREE)
    assert result.output == "True 1\n"


def test_runs_from_several_threads_do_not_mix():
    def run(index):
        result = run_python(f"import os; open('x', 'x'); os.write(3, b'{index}')", FREE)
        return result.returncode, int(result.report)

    with ThreadPoolExecutor(max_workers=4) as pool:
        assert list(pool.map(run, range(12))) == [(0, index) for index in range(12)]


def test_nothing_is_left_open_in_the_parent():
    run_python("", FREE)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        run_python("print(1)", FREE)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_source_that_is_no_python_fails_like_any_program():
    for source in ("def", "x = '\ud800'", "x = '\0'"):
        result = run_python(source, FREE)
        assert result.returncode == 1
        assert "SyntaxError" in result.output


def test_refused_namespaces_are_reported():
    gaps = run_without_namespaces("print('ready')")[1]
    assert any("network is open" in gap for gap in gaps)
    assert any("mount namespaces" in gap for gap in gaps)


def test_daemonised_child_is_dead_afterwards_without_namespaces(marker):
    result, _ = run_without_namespaces(daemon_source(marker))
    assert (result["is_finished"], result["output"]) == (True, "left\n")
    assert not is_alive(marker)


def test_files_are_out_of_reach_without_namespaces(tmp_path):
    tmp_path.chmod(0o777)
    (tmp_path / "secret").write_text("secret")
    source = f"""
        import os
        open("inside", "w").write("text")
        os.makedirs("locked/folder")
        os.chmod("locked", 0)
        for path, mode in (({str(tmp_path / "secret")!r}, "r"), ({str(tmp_path / "new")!r}, "w")):
            try:
                open(path, mode)
                print("opened", path)
            except OSError:
                pass
        print(os.environ["HOME"])
    """
    result, gaps = run_without_namespaces(source)
    if any("Files are open" in gap for gap in gaps):
        pytest.skip("the kernel has no Landlock")
    assert result["returncode"] == 0, result
    assert "opened" not in result["output"]
    assert not Path(result["output"].strip()).parent.exists()


@pytest.mark.parametrize("field", ["wall_seconds", "num_processes", "memory_gib", "output_kib"])
def test_limit_that_is_not_positive_is_refused(field):
    with pytest.raises(ValueError, match=f"`{field}` must be positive, got 0"):
        SandboxLimits(**{field: 0})
