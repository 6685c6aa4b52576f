"""Jobs on a real SLURM: signals, time limits, requeues and dependencies, with the files of configs.

The cluster is this machine: two nodes that are processes, see `slurm_cluster.py`.
"""

import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from slurm_cluster import Cluster, free_port, one_machine_cluster, wait_for, why_not
from tiny_run import ROLLOUTS
from whole_runs import checkpoint_of, fit_arguments, metrics_of

from lar_lightning.recovery.requeue import SlurmJob, leave, turns_path
from lar_lightning.trajectories import read_trajectories

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(800),
]
SMALL_JOB = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")
SHARDED = (
    "--config=configs/strategy/fsdp.yaml",
    "--trainer.strategy.init_args.save_distributed_checkpoint=false",
)
FORTY_STEPS = (
    "--trainer.max_steps=40",
    "--trainer.max_epochs=-1",
    "--trainer.log_every_n_steps=1",
    "--checkpoint.every_n_train_steps=1",
    "--data.init_args.loading.batch_size=8",
    "--model.learning_rate=1.0",
)


@dataclass(frozen=True, kw_only=True)
class FitJob:
    """A job that trains."""

    job_id: str
    run_dir: Path

    def log(self) -> str:
        """Return what its processes have written."""
        files = sorted((self.run_dir / "slurm").glob(f"fit-{self.job_id}*.log"))
        return "\n".join(file.read_text(errors="replace") for file in files)

    def check(self, condition: bool) -> None:
        assert condition, self.log()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with one_machine_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def settings_of_jobs(run_dir: Path) -> dict[str, str]:
    """Return what users set, and what a cluster of one machine needs."""
    return {
        "PYTHON": sys.executable,
        "RUN_DIR": str(run_dir),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",  # names of nodes mean nothing here
        "MASTER_PORT": str(free_port()),
    }


def submit_fit(
    cluster: Cluster, file: str, run_dir: Path, checkpoint: Path, sbatch: list[str], *fit: str
) -> FitJob:
    _, *arguments = fit_arguments(run_dir, checkpoint, *fit)
    output = f"--output={cluster.folder}/%x-%j.out"
    job_id = cluster.submit(
        *SMALL_JOB,
        output,
        *sbatch,
        f"configs/slurm/{file}",
        *arguments,
        **settings_of_jobs(run_dir),
    )
    return FitJob(job_id=job_id, run_dir=run_dir)


def two_nodes(cluster: Cluster, run_dir: Path, checkpoint: Path, *fit: str) -> FitJob:
    options = (*FORTY_STEPS, *fit, *SHARDED)
    return submit_fit(cluster, "fit_nodes.sbatch", run_dir, checkpoint, ["--nodes=2"], *options)


def steps_config(run_dir: Path, num_steps: int) -> Path:
    """Write how long a run trains, which each of its job's turns reads anew."""
    config = run_dir / "steps.yaml"
    config.write_text(f"trainer:\n  max_steps: {num_steps}\n  max_epochs: -1\n")
    return config


def test_job_of_two_nodes_that_is_requeued_twice_ends_like_one_that_is_not_disturbed(
    cluster: Cluster,
    rolled_out: Path,
    run_dir: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
) -> None:
    """One signal comes while the first process mines and the second waits, one within training."""
    job = two_nodes(cluster, run_dir, tiny_checkpoint)
    wait_for(lambda: "rollouts (train)" in job.log(), "mining", 240)
    cluster.run("scancel", "--signal=USR1", job.job_id)
    wait_for(lambda: "SIGUSR1: training had not begun" in job.log(), "the first requeue", 30)

    whole = Path(shutil.copytree(rolled_out, tmp_path / "whole"))
    undisturbed = two_nodes(cluster, whole, tiny_checkpoint)

    wait_for((run_dir / "checkpoints" / "last.ckpt").exists, "training", 240)
    cluster.run("scancel", "--signal=USR1", job.job_id)
    ended = cluster.wait(job.job_id)
    job.check(ended["JobState"] == "COMPLETED" and ended["Restarts"] == "2")
    # Where one process listens before the other trains, it asks for the requeue, and SLURM's own
    # SIGTERM is what the other saves for.
    stopped = re.search(r"SIG(?:USR1|TERM): saved \S+ after step (\d+); .*requeued", job.log())
    job.check(stopped is not None and 0 < int(stopped[1]) < 40)
    job.check("goes on from" in job.log())

    undisturbed.check(cluster.wait(undisturbed.job_id)["JobState"] == "COMPLETED")
    resumed, expected = checkpoint_of(run_dir), checkpoint_of(whole)
    assert resumed["global_step"] == expected["global_step"] == 40
    for name, value in expected["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    for metric in ("train/loss_nats", "val/loss_nats"):
        assert metrics_of(run_dir, metric) == metrics_of(whole, metric)
    assert len(metrics_of(whole, "train/loss_nats")) == 40


def test_chain_runs_each_stage_after_the_one_before_also_when_one_is_requeued(
    cluster: Cluster, run_dir: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    trajectories = run_dir / "trajectories" / "train.jsonl"
    lines = trajectories.read_text().splitlines(keepends=True)
    trajectories.write_text("".join(lines[:-3]))  # so that there is something to roll out
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(chain_config(tiny_checkpoint)))
    small = " ".join(SMALL_JOB)
    said = cluster.run(
        "configs/slurm/chain.sh",
        **settings_of_jobs(run_dir),
        CONFIG=str(config),
        NUM_ROLLOUT_TASKS="2",
        **{f"{stage}_OPTIONS": small for stage in ("ROLLOUT", "FIT", "EVALUATE")},
    )
    rollout, fit, evaluate = re.findall(r"^(?:rollout|fit|evaluate) +(\d+) ", said, re.MULTILINE)
    assert cluster.job(fit)["Dependency"].startswith(f"afterok:{rollout}")
    assert cluster.job(evaluate)["Dependency"].startswith(f"afterok:{fit}")

    cluster.wait(rollout, "RUNNING", seconds=60)
    log = run_dir / "slurm" / f"rollout-{rollout}_0.log"
    wait_for(log.exists, "the first rollouts", 30)
    cluster.run("scancel", "--signal=USR1", "--batch", f"{rollout}_0")
    wait_for(lambda: "is requeued" in log.read_text(), "the requeue", 30)

    def all_logs() -> str:
        return "\n".join(file.read_text() for file in (run_dir / "slurm").glob("*.*"))

    assert cluster.wait(evaluate, seconds=400)["JobState"] == "COMPLETED", all_logs()
    assert cluster.job(f"{rollout}_0")["Restarts"] == "1"
    assert len(trajectories.read_text().splitlines()) == len(lines) - 3
    found = read_trajectories(trajectories)  # with those of both tasks of the array
    assert len({trajectory.trajectory_id for trajectory in found}) == len(found) == len(lines) - 1
    assert (run_dir / "results.json").exists()
    assert (run_dir / "report.html").exists()
    assert " reused" in log.read_text()


def chain_config(checkpoint: Path) -> dict:
    """Return a run that every verb knows all of."""
    content = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    content["base_model"] = str(checkpoint)
    content["trainer"] |= {"max_steps": 3, "max_epochs": -1, "enable_progress_bar": False}
    content["model"] = {"trainable": "rows"}
    content["evaluation"] = {"max_tokens": 8, "num_runs": 1, "engine": "transformers"}
    content["data"]["init_args"] = {
        "rollouts": {
            "num_held_out": ROLLOUTS.num_held_out,
            "temperatures": list(ROLLOUTS.temperatures),
            "held_out_temperatures": list(ROLLOUTS.held_out_temperatures),
            "max_tokens": ROLLOUTS.max_tokens,
            "engine": "transformers",
        },
        "mining": {"max_latents": 12, "min_support": 3},
        "loading": {"batch_size": 16},
    }
    return content


def test_time_limit_ends_a_turn_and_the_next_goes_on_from_there(
    cluster: Cluster, run_dir: Path, tiny_checkpoint: Path
) -> None:
    """No checkpoint but the one of the signal is saved before the end of either turn."""
    config = steps_config(run_dir, 1_000_000)
    rare = ("--checkpoint.every_n_train_steps=1000000", "--trainer.limit_val_batches=0")
    limits = ["--time=01:00:00", "--signal=USR1@120"]
    more = (*rare, "--config", str(config))
    job = submit_fit(cluster, "fit.sbatch", run_dir, tiny_checkpoint, limits, *more)
    wait_for((run_dir / "logs" / "version_0" / "metrics.csv").exists, "training", 240)

    # Two minutes more than it has run: SLURM's own clock gives the signal now.
    hours, minutes, _ = map(int, cluster.job(job.job_id)["RunTime"].split(":"))
    limit = hours * 60 + minutes + 2
    cluster.run("scontrol", "update", f"jobid={job.job_id}", f"timelimit={limit}")
    wait_for(lambda: "is requeued" in job.log(), "the time limit", 100)
    cluster.run("scontrol", "update", f"jobid={job.job_id}", "timelimit=60")
    stopped = re.search(r"SIGUSR1: saved \S+ after step (\d+); job \d+ is requeued", job.log())
    job.check(stopped is not None)
    num_steps = int(stopped[1]) if stopped else 0
    steps_config(run_dir, num_steps + 5)

    ended = cluster.wait(job.job_id)
    job.check(ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1")
    job.check("goes on from" in job.log())
    assert checkpoint_of(run_dir)["global_step"] == num_steps + 5


@pytest.fixture
def sleeping(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmJob:
    """A job that does nothing; what asks for it here asks the cluster."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "sleep.sbatch"
    script.write_text("#!/bin/bash\nsleep 300\n")
    job_id = cluster.submit(*SMALL_JOB, "--output=/dev/null", str(script))
    cluster.wait(job_id, "RUNNING", seconds=60)
    return SlurmJob(job_id=job_id, num_restarts=0, is_first_process=True)


def test_job_is_put_back_into_the_queue(
    cluster: Cluster, sleeping: SlurmJob, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert leave(sleeping, tmp_path, signal.SIGTERM, "saved", 2) == 0
    assert "is requeued, for the turn 2" in capsys.readouterr().out
    assert cluster.job(sleeping.job_id)["Restarts"] == "1"
    # the signal with which SLURM ends the turn
    assert leave(sleeping, tmp_path, signal.SIGTERM, "saved", 2) == 0
    assert "SLURM has requeued job" in capsys.readouterr().out
    assert cluster.job(sleeping.job_id)["Restarts"] == "1"
    cluster.run("scancel", sleeping.job_id)


def test_job_that_was_cancelled_does_not_come_back(
    cluster: Cluster, sleeping: SlurmJob, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cluster.run("scancel", sleeping.job_id)
    cluster.wait(sleeping.job_id, "COMPLETING")
    assert leave(sleeping, tmp_path, signal.SIGTERM, "saved", 2) == 0
    assert "was cancelled, so it is not requeued" in capsys.readouterr().out
    assert cluster.wait(sleeping.job_id)["JobState"] == "CANCELLED"


def test_job_whose_turns_bring_nothing_ends_with_the_reason(
    cluster: Cluster, sleeping: SlurmJob, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The first has nothing to be compared with, and the second brings an episode."""
    for num_idle in (0, 0):
        assert leave(sleeping, tmp_path, signal.SIGUSR1, "saved", 1) == 0
        assert f'"num_idle": {num_idle}' in turns_path(tmp_path).read_text()
        (tmp_path / "trajectories").mkdir(exist_ok=True)
        (tmp_path / "trajectories" / "train.jsonl").write_text("an episode")
        cluster.wait(sleeping.job_id, "RUNNING", seconds=60)
        sleeping = replace(sleeping, num_restarts=sleeping.num_restarts + 1)
    capsys.readouterr()
    assert leave(sleeping, tmp_path, signal.SIGUSR1, "saved", 1) == 128 + signal.SIGUSR1
    assert "is not requeued: its last 1 turns made no training step" in capsys.readouterr().out
    assert cluster.job(sleeping.job_id)["Restarts"] == "2"
    cluster.run("scancel", sleeping.job_id)


@pytest.mark.parametrize(("path", "reason"), [("", "scontrol is not found"), (None, "Invalid job")])
def test_job_that_cannot_be_requeued_fails_with_the_reason_and_keeps_what_is_saved(
    path: str | None,
    reason: str,
    sleeping: SlurmJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    if path is not None:
        monkeypatch.setenv("PATH", path)
    job = replace(sleeping, job_id="999999")
    assert leave(job, tmp_path, signal.SIGTERM, "saved last.ckpt", 2) == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    assert f"requeue: SIGTERM: saved last.ckpt; job {job.job_id} could not be requeued" in said
    assert reason in said
    assert "Submit it again: it goes on from there" in said
