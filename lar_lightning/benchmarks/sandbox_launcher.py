"""Shut a process in and let it become the hostile program; a script that `sandbox.py` starts.

Process tree: launcher (stays as it is, sweeps up) -> stage (drops root, enters the namespaces)
-> supervisor (first process of the PID namespace, keeps the time) -> program. Every layer is tried
for itself; one that the machine refuses is reported as a gap and the remaining ones still hold:

- namespaces: own mounts (new root with the system read-only), network, processes, System V memory;
- an unprivileged user that belongs to this run alone, no capabilities, no_new_privs;
- Landlock: files, TCP, signals and abstract sockets, also where namespaces are forbidden;
- resource limits. They count per process, so memory is bounded by `memory * processes` only.
  Root that may not become another user is exempt from the limit on processes; the program can
  then start neither processes nor threads (seccomp).

The interpreter may live below a home folder that the unprivileged user cannot enter. So its folder
is held across the change of user: as working folder, which is what a new mount namespace takes
along, and as descriptor, which /proc/self/fd/N leads through where there is no such namespace.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import math
import os
import resource
import signal
import stat
import struct
import sys
import time
import traceback
from collections.abc import Callable

REPORT_FD = 3
READABLE_PATHS = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")

# Far above the ids of people, services and containers; the second range fits a container's map.
OWN_UID_RANGES = ((0x70000000, 2**22), (20000, 40000))
INNER_UID = 65534

NEW_USER = 0x10000000
NAMESPACES = {"mount": 0x00020000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x08000000}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND = 1, 2, 4, 32, 4096
MS_REC, MS_PRIVATE, MNT_DETACH = 16384, 1 << 18, 2
MS_KEPT = 1 | 2 | 4 | 8 | 1024 | 2048
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
# Machine -> (its number in seccomp, numbers of clone, clone3, fork and vfork).
FORK_CALLS = {
    "x86_64": (0xC000003E, (56, 435, 57, 58)),
    "aarch64": (0xC00000B7, (220, 435)),
}
CAPABILITY_VERSION = 0x20080522
# System call numbers that all architectures share.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1, 2, 4, 8, 1 << 14

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, action: str) -> int:
    """Raise OSError where a libc call failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{action}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int) -> None:
    """Call prctl; all options used here exist since Linux 3.5."""
    check(libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount `source` on `target`."""
    arguments = (text.encode() for text in (source, target, kind))
    check(libc.mount(*arguments, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


class Status:
    """The pipe to the parent: one JSON object per line, closed before the program starts."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def send(self, **message: object) -> None:
        """Write one message; shorter than a page, so lines never mix."""
        os.write(self.fd, json.dumps(message).encode()[:4000] + b"\n")


def drop_root(config: dict) -> bool:
    """Become a user of this run alone, owning the working folder; False if not root or denied."""
    if os.geteuid() != 0:
        return False
    for start, count in OWN_UID_RANGES:
        uid = start + config["run_id"] % count
        with contextlib.suppress(OSError):
            os.fchown(config["work_fd"], uid, uid)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            # The change of user made /proc/self belong to root; the id maps are written there.
            prctl(PR_SET_DUMPABLE, 1)
            return True
    return False


def enter_user_namespace() -> bool:
    """Enter a user namespace, in which an ordinary user may make the other namespaces."""
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(NEW_USER) != 0:
        return False
    with contextlib.suppress(OSError):
        # Not mapped to 0, so that the exec of the program loses every capability.
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{INNER_UID} {uid} 1"),
            ("gid_map", f"{INNER_UID} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    return True


def bind_read_only(source: str, target: str) -> None:
    """Show `source` at `target`, read-only; the folder of a file or device must be ours."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(source, target, "none", MS_BIND | MS_REC)
    # Flags of the source mount may be locked, so they are repeated.
    flags = os.statvfs(target).f_flag & MS_KEPT
    mount("none", target, "none", flags | MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)


def build_root(config: dict, program: bytes) -> None:
    """Change the root to one with the system read-only, the program and an empty work folder.

    The current folder must be `sys.base_prefix`.
    """
    base = config["base"]
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=64m,mode=0755")
    try:
        for path in filter(os.path.exists, READABLE_PATHS):
            bind_read_only(path, base + path)
        bind_read_only(".", base + sys.base_prefix)
        work = f"{base}{base}/work"
        os.makedirs(work)
        with open(f"{base}{base}/program.py", "xb") as file:
            file.write(program)
        size = f"size={config['disk_mib']}m,nr_inodes=4096,mode=0700"
        mount("tmpfs", work, "tmpfs", MS_NOSUID | MS_NODEV, size)
        mount("none", base, "none", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
        os.chroot(base)
    except OSError:
        libc.umount2(base.encode(), MNT_DETACH)
        raise
    config["work_fd"] = os.open(f"{base}/work", os.O_RDONLY)


def restrict_with_landlock(handles: dict[str, int], work_fd: int) -> int:
    """Allow reads below `handles` and writes below the working folder only.

    Returns:
        The Landlock version of the kernel, 0 where there is none: 1 files, 4 TCP, 6 signals.
    """
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return 0
    rights = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    # File rights, TCP bind and connect, abstract sockets and signals.
    size = 8 if version < 4 else 16 if version < 6 else 24
    attributes = struct.pack("=QQQ", rights, 3, 3)[:size]
    ruleset = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    check(ruleset, "landlock_create_ruleset")
    allowed = dict.fromkeys(handles.values(), EXECUTE | READ_FILE | READ_DIR)
    if "/dev/null" in handles:
        allowed[handles["/dev/null"]] |= WRITE_FILE | TRUNCATE
    allowed[work_fd] = rights
    for handle, access in allowed.items():
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            access &= EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
        rule = struct.pack("=Qi", access & rights, handle)
        check(libc.syscall(ADD_RULE, ruleset, 1, rule, 0), "landlock_add_rule")
    check(libc.syscall(RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    return version


def forbid_new_processes() -> bool:
    """Let all calls that start a process or thread fail with EAGAIN; False where unsupported."""
    machine = os.uname().machine
    if machine not in FORK_CALLS:
        return False
    architecture, calls = FORK_CALLS[machine]
    load, jump_equal, jump_at_least, end = 0x20, 0x15, 0x35, 0x06
    num_calls = len(calls)
    instructions = [
        (load, 0, 0, 4),
        (jump_equal, 1, 0, architecture),
        (end, 0, 0, 0x80000000),
        (load, 0, 0, 0),
        # The second calling convention of x86_64 has the same calls from here on.
        (jump_at_least, num_calls + 1, 0, 0x40000000),
        *((jump_equal, num_calls - index, 0, call) for index, call in enumerate(calls)),
        (end, 0, 0, 0x7FFF0000),
        (end, 0, 0, 0x00050000 | errno.EAGAIN),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in instructions))
    header = struct.pack("HP", len(instructions), ctypes.addressof(program))
    return libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0) == 0


def count_tasks(uid: int) -> int:
    """Count the threads of a user, which all count against its process limit."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
            if int(fields["Uid"].split()[0]) == uid:
                count += int(fields["Threads"])
    return count


def set_resource_limits(config: dict, num_other_tasks: int) -> None:
    """Set the limits of this process and its children, never above those already there."""
    wanted = {
        resource.RLIMIT_CPU: math.ceil(config["cpu_seconds"]) + 1,
        resource.RLIMIT_AS: int(config["memory_gib"] * 2**30),
        resource.RLIMIT_FSIZE: config["disk_mib"] * 2**20,
        resource.RLIMIT_NOFILE: config["num_open_files"],
        resource.RLIMIT_NPROC: config["num_processes"] + num_other_tasks,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (limit, limit))
    # SIGXCPU at the limit tells the reason; a program that ignores it is killed a second later.
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (max(soft - 1, 1), hard))


def become_program(config: dict, status: Status, handles: dict[str, int], has: set[str]) -> None:
    """Give up what is left to give up, report the gaps and exec the program."""
    os.setsid()
    # What else counts against the limit: nothing, supervisor and stage, or all of this user's.
    if drop_root(config):
        has.add("own_uid")
        num_other_tasks = 0
    else:
        num_other_tasks = 2 if has & {"own_uid", "user"} else count_tasks(os.getuid())
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    set_resource_limits(config, num_other_tasks)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    check(libc.capset(struct.pack("=Ii", CAPABILITY_VERSION, 0), bytes(24)), "capset")
    os.fchdir(config["work_fd"])
    landlock = restrict_with_landlock(handles, config["work_fd"])
    is_exempt = "root" in has and "own_uid" not in has
    gaps = {
        "files": "mount" not in has and landlock < 1,
        "network": "net" not in has and landlock < 4,
        "datagrams": "net" not in has and landlock >= 4,
        "unix_sockets": "mount" not in has,
        "signals": not has & {"pid", "own_uid"} and landlock < 6,
        "processes": not has & {"pid", "own_uid"},
        "process_limit": is_exempt and not forbid_new_processes(),
    }
    status.send(gaps=[name for name, is_gap in gaps.items() if is_gap])
    executable = os.path.realpath(sys.executable)
    if not os.access(executable, os.X_OK):
        # Kept open on purpose, above the report's number: Python finds its library through it.
        prefix = fcntl.fcntl(handles[sys.base_prefix], fcntl.F_DUPFD, REPORT_FD + 1)
        executable = f"/proc/self/fd/{prefix}/{os.path.relpath(executable, sys.base_prefix)}"
    os.dup2(config["report_fd"], REPORT_FD)
    os.set_inheritable(REPORT_FD, True)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    arguments = [executable, "-I", "-S", "-B", "../program.py"]
    os.execve(executable, arguments, dict(os.environ))


def wait_for(program: int, wall_seconds: float) -> tuple[int, resource.struct_rusage, bool]:
    """Wait for the program, killing it at the time limit; reap orphans on the way."""
    deadline = time.monotonic() + wall_seconds
    timed_out = False
    while True:
        pid, wait_status, usage = os.wait4(-1, os.WNOHANG)
        if pid == program:
            return wait_status, usage, timed_out
        if pid != 0:
            continue
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            timed_out = True
            os.kill(program, signal.SIGKILL)
        signal.sigtimedwait({signal.SIGCHLD}, max(remaining, 0.01))


def supervise(config: dict, status: Status, handles: dict[str, int], has: set[str]) -> None:
    """Start the program, wait for it no longer than allowed and report how it ended."""
    if "mount" in has:
        try:
            with open(handles["../program.py"], "rb", closefd=False) as file:
                build_root(config, file.read())
            handles["../program.py"] = os.open(f"{config['base']}/program.py", os.O_PATH)
        except OSError:
            has.discard("mount")
    # The same user may run the program: keep it from reading our memory and descriptors.
    prctl(PR_SET_DUMPABLE, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    start = time.monotonic()
    program = guarded_fork(become_program, config, status, handles, has)
    wait_status, usage, timed_out = wait_for(program, config["wall_seconds"])
    seconds = time.monotonic() - start
    returncode = os.waitstatus_to_exitcode(wait_status)
    is_cpu_spent = usage.ru_utime + usage.ru_stime >= config["cpu_seconds"]
    status.send(
        returncode=returncode,
        timed_out=timed_out
        or returncode == -signal.SIGXCPU
        or (returncode == -signal.SIGKILL and is_cpu_spent),
        seconds=seconds,
    )


def stage(config: dict, status: Status, handles: dict[str, int], has: set[str]) -> None:
    """Enter the namespaces; root does so directly, everybody else in a user namespace."""
    os.chdir(sys.base_prefix)
    if os.geteuid() == 0:
        has.add("root")
    if "root" not in has or libc.unshare(NAMESPACES["mount"]) != 0:
        if drop_root(config):
            has.add("own_uid")
        if enter_user_namespace():
            has.add("user")
    has.update(name for name, flag in NAMESPACES.items() if libc.unshare(flag) == 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.waitpid(guarded_fork(supervise, config, status, handles, has), 0)


def kill_own_user(config: dict, status: Status) -> None:
    """Kill everything of the user that this run became, also what nobody is the parent of."""
    if drop_root(config):
        os.kill(-1, signal.SIGKILL)


def guarded_fork(
    function: Callable[..., None], config: dict, status: Status, *others: object
) -> int:
    """Run `function` in a child that reports its exception and never returns into our frames."""
    pid = os.fork()
    if pid == 0:
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            function(config, status, *others)
        except BaseException:
            status.send(error=traceback.format_exc()[-1500:])
        finally:
            os._exit(0)
    return pid


def kill_children() -> None:
    """Kill and reap all children; orphans of the run are ours by then."""
    own_pid = str(os.getpid())
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
                    if file.read().rpartition(")")[2].split()[1] == own_pid:
                        os.kill(int(pid), signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0] != 0:
                pass


def main() -> None:
    """Run the program described by the JSON argument."""
    config = json.loads(sys.argv[1])
    config["run_id"] = int.from_bytes(os.urandom(3), "little")
    status = Status(config["status_fd"])
    for fd in (config["status_fd"], config["report_fd"]):
        os.set_inheritable(fd, False)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        # When memory runs out the kernel takes the program, not the training run.
        file.write("1000")
    os.umask(0o022)
    config["work_fd"] = os.open(".", os.O_RDONLY)
    handles = {"../program.py": os.open("../program.py", os.O_RDONLY)}
    for path in filter(os.path.exists, (*READABLE_PATHS, sys.base_prefix)):
        handles[path] = os.open(path, os.O_PATH)
    os.waitpid(guarded_fork(stage, config, status, handles, set()), 0)
    os.waitpid(guarded_fork(kill_own_user, config, status), 0)
    kill_children()


if __name__ == "__main__":
    main()
