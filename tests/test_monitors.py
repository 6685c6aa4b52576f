"""What a run records while it trains: figures, files, tables, the bar; also stopped and resumed.

One run is watched by everything at once, in a terminal; others are compared with it.
"""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import in_shards
from whole_runs import TEN_STEPS, checkpoint_of, fit_arguments, fit_until, metrics_of

import callbacks
from callbacks.latent_sample_table import bracketed, highlighted
from callbacks.row_monitor import row_figures
from lar_lightning.__main__ import main
from lar_lightning.evaluation.examples import Piece
from lar_lightning.metrics.operations import size_of, step_operations
from lar_lightning.metrics.records import StepRecords
from lar_lightning.segments import LatentVocabulary
from lar_lightning.trajectories import read_trajectories

ALL = (
    {"class_path": "callbacks.LatentSampleTable"},  # before the one that has the texts written
    {"class_path": "callbacks.ThroughputMonitor", "init_args": {"every_n_steps": 1}},
    {
        "class_path": "callbacks.HorizonMetrics",
        "init_args": {"generate_every_n_steps": 4, "max_tokens": 24},
    },
    {"class_path": "callbacks.RowMonitor", "init_args": {"every_n_steps": 1}},
    {"class_path": "callbacks.SuccessProbe", "init_args": {"every_n_steps": 5, "num_tasks": 2}},
)
WATCHED = (*TEN_STEPS, "--checkpoint.every_n_train_steps=1", "--trainer.log_every_n_steps=1")
ELSEWHERE = {
    "memory/peak_device_gib",
    *("weights/norm", "weights/gradient_norm"),
    *("gen/samples", "gen/samples_page"),
}
"""Promised where there is a CUDA device, where more than rows is trained, and to W&B."""


def watched_by(path: Path, run_dir: Path, *, with_wandb: bool = False) -> list[str]:
    """Return the options that have a run watched by all callbacks."""
    loggers = [{"class_path": "CSVLogger", "init_args": {"save_dir": str(run_dir), "name": "logs"}}]
    if with_wandb:
        options = {"save_dir": str(run_dir), "offline": True, "project": "tiny"}
        loggers.append(
            {"class_path": "lar_lightning.tracking.tracked_run.TrackedRun", "init_args": options}
        )
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": list(ALL), "logger": loggers}}))
    return [f"--config={path}"]


@contextmanager
def terminal(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make standard output a real terminal; what appears there is in the list behind it."""
    reader, writer = pty.openpty()
    seen: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                part = os.read(reader, 65536)
            except OSError:  # the other side is closed
                return
            seen.append(part)

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    shown: list[str] = []
    patch.setenv("TERM", "xterm-256color")
    patch.setenv("COLUMNS", "200")
    with os.fdopen(writer, "w") as screen:
        patch.setattr(sys, "stdout", screen)
        yield shown
        patch.undo()
    thread.join(timeout=10)
    os.close(reader)
    shown.append(b"".join(seen).decode(errors="replace"))


@pytest.fixture(scope="module")
def watched(
    rolled_out: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Ten steps with all callbacks, W&B offline, and what the terminal showed."""
    folder = Path(shutil.copytree(rolled_out, tmp_path_factory.mktemp("watched") / "run"))
    options = watched_by(folder / "watched.yaml", folder, with_wandb=True)
    bar = "--trainer.enable_progress_bar=true"
    with pytest.MonkeyPatch.context() as patch, terminal(patch) as shown:
        patch.setenv("WANDB_SILENT", "true")
        assert main(fit_arguments(folder, tiny_checkpoint, *options, *WATCHED, bar)) == 0
    return folder, shown[0]


def samples_of(run_dir: Path) -> list[dict[str, Any]]:
    return StepRecords(run_dir / "metrics" / "samples.jsonl").read()


def without_times(run_dir: Path) -> dict[str, list[float]]:
    names = ("gen/units_per_token", "gen/adoption", "gen/repetition", "gen/agreement")
    return {name: metrics_of(run_dir, name) for name in names}


def test_every_promised_figure_is_in_the_log(watched: tuple[Path, str]) -> None:
    for name in callbacks.__all__:
        text = getattr(callbacks, name).__doc__
        groups = "val|gen|throughput|memory|rows|weights"
        promised = set(re.findall(rf"\b(?:{groups})/[a-z_]+", text)) - ELSEWHERE
        promised |= {key.replace("/input_", "/output_") for key in promised}
        for key in sorted(promised):
            assert metrics_of(watched[0], key), f"{name} promises {key}"


def test_texts_are_written_at_the_start_every_few_steps_and_at_the_end(
    watched: tuple[Path, str],
) -> None:
    run_dir, _ = watched
    samples = samples_of(run_dir)
    assert sorted({row["step"] for row in samples}) == [0, 4, 8, 10]
    ratios = [
        sum(row["units"] for row in samples if row["step"] == step)
        / sum(row["tokens"] for row in samples if row["step"] == step)
        for step in (0, 4, 8, 10)
    ]
    assert metrics_of(run_dir, "gen/units_per_token") == pytest.approx(ratios)
    held_out = read_trajectories(run_dir / "trajectories" / "held_out.jsonl")
    assert {row["task"] for row in samples} == {item.task_id for item in held_out}
    for row in samples:
        assert "".join(text for text, *_ in row["pieces"]) == row["text"]
        assert row["tokens"] <= 24 + 16
        assert row["prompt_end"].endswith("assistant\n")
        assert 0 <= row["agreement"] <= 1


def test_watching_changes_nothing_of_what_is_learned(
    watched: tuple[Path, str], trained: Path
) -> None:
    found, wanted = (checkpoint_of(run)["state_dict"] for run in (watched[0], trained))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert metrics_of(watched[0], "val/loss_nats") == metrics_of(trained, "val/loss_nats")


def test_texts_are_written_after_prompts_of_rollouts_in_shards_too(
    run_dir: Path, tiny_checkpoint: Path
) -> None:
    in_shards(run_dir)
    options = ("--trainer.max_steps=1", "--trainer.max_epochs=-1")
    assert main(fit_arguments(run_dir, tiny_checkpoint, *options)) == 0
    assert len(metrics_of(run_dir, "gen/units_per_token")) == 2


def test_usage_adds_up_to_the_adoption_that_is_logged(watched: tuple[Path, str]) -> None:
    run_dir, _ = watched
    records = StepRecords(run_dir / "metrics" / "latent_usage.jsonl").read()
    held_out = [record for record in records if record["source"] == "held_out"]
    assert [sum(r["taken"]) / sum(r["due"]) for r in held_out] == pytest.approx(
        metrics_of(run_dir, "val/expected_adoption"), abs=1e-3
    )
    vocabulary = LatentVocabulary.load(run_dir)
    due = [0] * len(vocabulary)
    for trajectory in read_trajectories(run_dir / "trajectories" / "held_out.jsonl"):
        for span in trajectory.action_spans:
            for unit in vocabulary.encode(trajectory.token_ids[span.start : span.end].tolist()):
                if vocabulary.is_latent(unit):
                    due[unit - vocabulary.base_size] += 1
    assert held_out[0]["due"] == due


def test_rows_leave_their_start_and_gradients_touch_them(watched: tuple[Path, str]) -> None:
    run_dir, _ = watched
    for side in ("input", "output"):
        distances = metrics_of(run_dir, f"rows/{side}_distance_mean")
        assert distances[0] == pytest.approx(0, abs=1e-6)
        assert distances[-1] > 0.01
        assert max(metrics_of(run_dir, f"rows/{side}_gradient_norm_max")) > 0
        assert all(0 < share <= 1 for share in metrics_of(run_dir, f"rows/{side}_touched_share"))


def test_row_figures_in_closed_form() -> None:
    start = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    figures = row_figures(
        torch.tensor([[3.0, 4.0], [0.0, 3.0]]), start, torch.tensor([[0.0, 0.0], [6.0, 8.0]])
    )
    assert {name: float(value) for name, value in figures.items()} == {
        "norm_mean": 4,
        "norm_max": 5,
        "distance_mean": 1,
        "distance_max": 2,
        "gradient_norm_mean": 5,
        "gradient_norm_max": 10,
        "touched_share": 0.5,
    }


@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
def test_operations_are_those_that_pytorch_counts(
    trainable: str, trained: Path, tiny_checkpoint: Path
) -> None:
    from lar_lightning.alignment import align
    from lar_lightning.batches import collate
    from lar_lightning.losses.distillation import distillation_loss
    from lar_lightning.models.student import load_student
    from tests.benchmarks.meter import FlopCounter

    vocabulary = LatentVocabulary.load(trained)
    trajectory = read_trajectories(trained / "trajectories" / "train.jsonl")[0]
    batch = collate([align(vocabulary, trajectory)])  # one alone: nothing is shared
    student = load_student(tiny_checkpoint, vocabulary, trainable=trainable)  # type: ignore[arg-type]
    with FlopCounter() as counter:
        teacher = student.teacher_hidden(batch.teacher_ids, batch.teacher_mask).flatten(0, 1)
        hidden = student.student_hidden(batch.student_ids, batch.student_mask).flatten(0, 1)
        rows = teacher[batch.teacher_rows], hidden[batch.student_rows]
        loss, _ = distillation_loss(*rows, student.heads, batch.targets, student.folding)
        loss.backward()
    wanted = float(step_operations(size_of(student), batch, is_cached=False))
    assert counter.total == pytest.approx(wanted, rel=0.1)


def test_the_terminal_shows_loss_and_horizon_at_a_glance(watched: tuple[Path, str]) -> None:
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", watched[1])
    line = next(part for part in re.split(r"[\r\n]+", shown)[::-1] if "units/token" in part)
    for part in ("Epoch", "loss: ", "held-out loss: ", "units/token: ", "tokens/s: "):
        assert part in line
    assert "v_num" not in line


def test_wandb_is_given_a_table_with_latents_highlighted(watched: tuple[Path, str]) -> None:
    (files,) = watched[0].glob("wandb/offline-run-*/files/media")
    tables = sorted(files.glob("table/gen/samples_*.json"), key=lambda p: int(p.name.split("_")[1]))
    assert len(tables) == 4
    content = json.loads(tables[-1].read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    kept = [row for row in samples_of(watched[0]) if row["step"] == 10]
    assert [row["task"] for row in rows] == [row["task"] for row in kept]
    for row, other in zip(rows, kept, strict=True):
        num_latents = sum(kind == "latent" for _, kind, *_ in other["pieces"])
        assert row["marked"].count("\u27e6") == num_latents
    pages = sorted(files.glob("html/gen/samples_page_*.html"))
    assert len(pages) == 4
    latents = sum(row["marked"].count("\u27e6") for row in rows)
    assert max(page.read_text().count("background:") for page in pages) >= latents > 0


def test_model_written_text_is_never_markup() -> None:
    pieces = [
        Piece(text="<script>alert('x')</script>\u202e", kind="explicit", num_units=9, num_tokens=9),
        Piece(text="</span><b>", kind="latent", num_units=1, num_tokens=4),
    ]
    page = highlighted(pieces)
    assert "<script" not in page
    assert "<b>" not in page
    assert "\u202e" not in page
    assert "&lt;/span&gt;&lt;b&gt;</span>" in page
    assert bracketed(pieces).endswith("\\u202e\u27e6</span><b>\u27e7")


def test_a_resumed_run_goes_on_counting_and_its_bar_has_a_total(
    watched: tuple[Path, str],
    run_dir: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    options = watched_by(run_dir / "watched.yaml", run_dir)
    bar = "--trainer.enable_progress_bar=true"
    arguments = fit_arguments(run_dir, tiny_checkpoint, *options, *WATCHED, bar)
    fit_until(7, arguments, monkeypatch)
    StepRecords(run_dir / "metrics" / "samples.jsonl").put(9, [{"task": "lost with the process"}])
    capsys.readouterr()
    assert main(arguments) == 0
    whole, _ = watched
    last = metrics_of(run_dir, "throughput/total_expanded_tokens")[-1]
    assert last == metrics_of(whole, "throughput/total_expanded_tokens")[-1]
    assert without_times(run_dir) == without_times(whole)
    assert samples_of(run_dir) == samples_of(whole)
    # Output is no terminal here: the plain bar takes over.
    assert re.search(r"Epoch 0: +\d+%\|.*\| 8/10 ", capsys.readouterr().out)


def test_a_table_without_a_writer_is_refused(
    run_dir: Path, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [ALL[0]]}}))
    assert main(fit_arguments(run_dir, tiny_checkpoint, f"--config={path}", *TEN_STEPS)) == 2
    assert "must hold HorizonMetrics with `generate_every_n_steps`" in capsys.readouterr().err


def test_two_processes_record_what_both_have_counted(
    watched: tuple[Path, str], run_dir: Path, tiny_checkpoint: Path
) -> None:
    """Each reads one of two held-out batches, and writes after two of four prompts."""
    options = watched_by(run_dir / "watched.yaml", run_dir)
    options += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    options += ["--data.init_args.loading.batch_size=2", "--trainer.max_steps=2"]
    options += ["--trainer.limit_val_batches=1.0", "--trainer.log_every_n_steps=1"]
    arguments = fit_arguments(run_dir, tiny_checkpoint, *options, "--trainer.max_epochs=1")
    subprocess.run(
        [sys.executable, "-m", "lar_lightning", *arguments],
        check=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
    )
    whole, _ = watched
    for name in ("horizon_units", "horizon_tokens", "prompt_units", "num_absent_latents"):
        assert metrics_of(run_dir, f"val/{name}")[0] == metrics_of(whole, f"val/{name}")[0]
    for name in ("expected_adoption", "usage_perplexity", "row_agreement"):
        found, wanted = (metrics_of(run, f"val/{name}")[0] for run in (run_dir, whole))
        assert found == pytest.approx(wanted, rel=0.02)
    samples = [row for row in samples_of(run_dir) if row["step"] == 0]
    assert [r["task"] for r in samples] == [r["task"] for r in samples_of(whole) if not r["step"]]
    assert metrics_of(run_dir, "gen/horizon_units")[0] == sum(row["units"] for row in samples)
    assert metrics_of(run_dir, "gen/horizon_tokens")[0] == sum(row["tokens"] for row in samples)
    # Two steps of two batches of two trajectories each, of both processes.
    lengths = [
        len(item.token_ids) for item in read_trajectories(run_dir / "trajectories" / "train.jsonl")
    ]
    total = metrics_of(run_dir, "throughput/total_expanded_tokens")[-1]
    assert 8 * min(lengths) <= total <= 8 * max(lengths)
    assert total > 4 * max(lengths) or min(lengths) * 8 <= 4 * max(lengths)
