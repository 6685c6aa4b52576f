"""A real SLURM on this machine: munge, a controller, and two nodes that are processes here.

No systemd, no database, no cgroups; everything lives in one folder and ends with the fixture.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "srun", "munged")
NODES = ("n1", "n2")

SLURM_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits for its old credential to lapse: two minutes unless told
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=2
DependencyParameters=kill_invalid_depend
ReturnToService=2
# nodes have what is written below, whatever the machine has
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=2
MinJobAge=600
PropagateResourceLimits=NONE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def why_not() -> str | None:
    """Return why no cluster can be had here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        return (
            f"{', '.join(missing)} not installed: `make test-slurm` installs SLURM as root on "
            f"Debian or Ubuntu (apt-get install {' '.join(PACKAGES)})"
        )
    if os.geteuid() != 0:
        return "a SLURM cluster of one's own needs root"
    return None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that is up."""

    folder: Path
    environment: dict[str, str] = field(repr=False)
    """For its commands."""

    def run(self, *command: str, **more: str) -> str:
        """Run one of its commands and return what it says."""
        result = subprocess.run(
            command,
            cwd=Path(__file__).parents[1],
            env={**self.environment, **more},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr or result.stdout}")
        return result.stdout.strip()

    def submit(self, *arguments: str, **more: str) -> str:
        """Submit a batch job and return its id."""
        return self.run("sbatch", "--parsable", *arguments, **more)

    def job(self, job_id: str) -> dict[str, str]:
        """Return what the controller says of a job."""
        said = self.run("scontrol", "show", "job", "-o", job_id).splitlines()[0]
        parts = [part.partition("=") for part in said.split()]
        return {key: value for key, equals, value in parts if equals}

    def wait(self, job_id: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """Wait until a job is in one of the states, or over."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

        def arrived() -> dict[str, str] | None:
            job = self.job(job_id)
            return job if job["JobState"] in (states or over) + over else None

        return wait_for(arrived, f"job {job_id} {states or 'to end'}", seconds)


def wait_for(probe: Callable[[], T | None], what: str, seconds: float) -> T:
    """Return the first result of a probe that holds something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = probe()
        if found:
            return found
        time.sleep(0.1)
    raise TimeoutError(f"waited {seconds:g} s for {what}")


@contextmanager
def one_machine_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster and end everything that it started."""
    folder = folder.resolve()  # the controller changes its folder
    for name in ("state", "log", "run", "munge", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM")
    }
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    cluster = Cluster(folder=folder, environment=environment)
    # Ends the cluster, too, where this process is killed: its input ends then.
    watch = subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        stdin=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        _start(cluster)
        yield cluster
    finally:
        _stop(cluster)
        watch.communicate(timeout=60)


def _start(cluster: Cluster) -> None:
    folder, munge = cluster.folder, cluster.folder / "munge"
    for place in (folder, *folder.parents):  # munged runs as another user
        if place.stat().st_uid == os.geteuid() and place != Path("/"):
            place.chmod(place.stat().st_mode | 0o111)
    key = munge / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    for place in (munge, key):
        shutil.chown(place, "munge", "munge")
    munge.chmod(0o755)
    (folder / "slurm.conf").write_text(
        SLURM_CONF.format(host=socket.gethostname().split(".")[0], folder=folder, ports=_ports(3))
    )
    files = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
    options = [
        f"--{name}{'' if name == 'socket' else '-file'}={munge / file}"
        for name, file in files.items()
    ]
    cluster.run("runuser", "-u", "munge", "--", "munged", *options)
    wait_for((munge / "socket").exists, "munged", 10)
    cluster.run("slurmctld")
    for node in NODES:
        cluster.run("slurmd", "-N", node)
    wait_for(
        lambda: cluster.run("sinfo", "-h", "-t", "idle", "-o", "%D") == str(len(NODES)),
        f"idle nodes (logs are in {folder / 'log'})",
        30,
    )


def _stop(cluster: Cluster) -> None:
    """Cancel what runs, end the daemons, and kill what is left of either."""
    run, munge = cluster.folder / "run", cluster.folder / "munge" / "pid"
    if (run / "slurmctld.pid").exists():
        with suppress(RuntimeError, subprocess.TimeoutExpired, TimeoutError):
            cluster.run("scancel", "--user=root")
            wait_for(lambda: not cluster.run("squeue", "-h"), "jobs to end", 20)
    daemons = [run / f"slurmd-{node}.pid" for node in NODES]
    for file in (*daemons, run / "slurmctld.pid", munge):
        _end(file)
    # what a killed daemon left running, such as a job's step
    for process in _processes_of(cluster.folder):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _end(pid_file: Path) -> None:
    try:
        process = int(pid_file.read_text())
    except (FileNotFoundError, ValueError):
        return
    for how, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        with suppress(ProcessLookupError):
            os.kill(process, how)
        with suppress(TimeoutError):
            wait_for(lambda: not _is_alive(process), "a daemon to end", seconds)
            return


def _is_alive(process: int) -> bool:
    """Return whether a process runs; one that is over but not yet fetched does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _processes_of(folder: Path) -> list[int]:
    """Return the processes whose SLURM is the one in the folder."""
    mark = f"SLURM_CONF={folder / 'slurm.conf'}".encode()
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdecimal() and int(place.name) != os.getpid():
            with suppress(OSError):
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    found.append(int(place.name))
    return found


def _ports(count: int) -> list[int]:
    """Return free ports; all are open at once, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def free_port() -> int:
    """Return a port that nobody listens on."""
    return _ports(1)[0]


def _path() -> str:
    """Return the search path, with the folders of daemons that users often lack."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([*folders, "/usr/sbin", "/sbin"]))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.stdin.read()
        _stop(Cluster(folder=Path(sys.argv[1]), environment=dict(os.environ)))
    elif reason := why_not():
        sys.exit(f"tests on SLURM are skipped: {reason}")
