"""Held-out tasks that the student plays while it is trained."""

import csv
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_run import ROLLOUTS, tiny_recording
from whole_runs import TEN_STEPS, fit_arguments, metrics_of

from lar_lightning.__main__ import main
from lar_lightning.base_models import tokenizer_fingerprint
from lar_lightning.benchmarks import load_benchmark
from lar_lightning.metrics.probe import StudentPolicy, probe
from lar_lightning.models.student import load_student
from lar_lightning.policies import Request, Sampling, generate
from lar_lightning.policies.transformers_engine import open_transformers
from lar_lightning.rollouts.roll_out import split_benchmark
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tokenizer import encode_text, render_chat
from lar_lightning.training.sampling import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROBE = ("--trainer.callbacks+=callbacks.SuccessProbe", "--trainer.callbacks.num_tasks=2")


@pytest.fixture
def no_latents(tiny_tokenizer: "PreTrainedTokenizerFast") -> LatentVocabulary:
    return LatentVocabulary(
        [],
        base_size=len(tiny_tokenizer),
        tokenizer_fingerprint=tokenizer_fingerprint(tiny_tokenizer),
    )


@pytest.fixture
def policy(
    tiny_checkpoint: Path, tiny_tokenizer: "PreTrainedTokenizerFast", no_latents: LatentVocabulary
) -> StudentPolicy:
    """A student that is its base model still."""
    student = load_student(tiny_checkpoint, no_latents, trainable="lora")
    return StudentPolicy(student, tiny_tokenizer, 4)


@pytest.mark.parametrize("stops", [(), (" return",), ("numbers", "e")])
def test_untrained_student_writes_what_the_engine_writes_of_its_base_model(
    stops: tuple[str, ...],
    policy: StudentPolicy,
    tiny_checkpoint: Path,
    tiny_tokenizer: "PreTrainedTokenizerFast",
) -> None:
    texts = ["Add the numbers.", "Sort a list", "What is it?"]
    chats = [render_chat(tiny_tokenizer, [{"role": "user", "content": t}])[0] for t in texts]
    requests = [
        Request(request_id=str(number), prompt_ids=ids, temperature=0.0)
        for number, ids in enumerate(chats)
    ]
    sampling = Sampling(max_tokens=24, stops=stops)
    with open_transformers(tiny_checkpoint, num_concurrent=4, max_model_len=512) as engine:
        written = [
            {c.request_id: (c.token_ids, c.is_finished) for c in generate(p, requests, sampling)}
            for p in (policy, engine)
        ]
    assert written[0] == written[1]
    assert not policy.step()  # nothing is left


def test_tasks_whose_tests_pass_are_solved(
    policy: StudentPolicy,
    no_latents: LatentVocabulary,
    tiny_tokenizer: "PreTrainedTokenizerFast",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two of three answers are the official solutions."""
    tasks = split_benchmark("humaneval", ROLLOUTS)[1][:3]
    answers = [
        f"```python\n{task.record['prompt']}{task.record['canonical_solution']}```<|im_end|>"
        for task in tasks[:2]
    ]
    answers.append("```python\npass\n```<|im_end|>")
    written = [
        Sample(units=encode_text(tiny_tokenizer, text), is_finished=True) for text in answers
    ]
    # The scheduler asks for an episode when its world is open, in any order.
    prompts = {task.task_id: sample for task, sample in zip(tasks, written, strict=True)}
    by_prompt = {
        tuple(
            render_chat(tiny_tokenizer, load_benchmark("humaneval").messages(task, "direct"))[0]
        ): prompts[task.task_id]
        for task in tasks
    }
    monkeypatch.setattr(
        "lar_lightning.metrics.probe.sample_units",
        lambda student, prompts, *_, **__: [by_prompt[tuple(prompt)] for prompt in prompts],
    )
    found = probe(
        policy,
        load_benchmark("humaneval"),
        "direct",
        tasks,
        no_latents,
        max_tokens=2048,
        max_model_len=8192,
    )
    assert (found.num_tasks, found.num_solved, found.num_failed) == (3, 2, 0)


def test_success_is_logged_at_the_start_every_few_steps_and_at_the_end(
    run_dir: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    often = (*TEN_STEPS, *PROBE, "--trainer.callbacks.every_n_steps=4")
    detection = "--trainer.callbacks+=callbacks.CollapseDetection"
    assert main(fit_arguments(run_dir, tiny_checkpoint, *often, detection)) == 0
    with next((run_dir / "logs").glob("version_0/metrics.csv")).open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["gen/success_rate"]]
    assert [int(row["step"]) for row in rows] == [0, 4, 8, 10]
    assert all(float(row["gen/success_rate"]) == 0 for row in rows)  # it has learnt nothing
    assert all(float(row["gen/probe_seconds"]) > 0 for row in rows)


def test_probing_changes_nothing_of_what_is_learned(
    run_dir: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    common = (*TEN_STEPS, "--trainer.log_every_n_steps=1")
    often = (*common, *PROBE, "--trainer.callbacks.every_n_steps=5")
    assert main(fit_arguments(run_dir, tiny_checkpoint, *often)) == 0
    assert main(fit_arguments(other, tiny_checkpoint, *common)) == 0
    assert metrics_of(run_dir, "train/loss_nats") == metrics_of(other, "train/loss_nats")


def test_a_stage_whose_student_solves_too_little_does_not_hold(
    run_dir: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    options = (
        "--trainer.max_epochs=2",
        *PROBE,
        "--trainer.callbacks.every_n_steps=1000",
        "--trainer.callbacks+=callbacks.AbstractionSchedule",
        "--trainer.callbacks.shares=[0.5,1.0]",
        "--trainer.callbacks.max_nats_per_token=50",
        "--trainer.callbacks.min_score=0.5",
    )
    assert main(fit_arguments(run_dir, tiny_checkpoint, *options)) == 0
    with (run_dir / "metrics" / "abstraction.csv").open() as lines:
        (stage,) = csv.DictReader(lines)
    assert stage["holds"] == "0"
    assert stage["reason"] == "the score 0 is below 0.5"


def test_recordings_cannot_be_played_and_are_refused_before_any_work(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    recording = tiny_recording(tmp_path / "recording.jsonl")
    arguments = ["fit", "--config=configs/recorded.yaml", f"--base_model={tiny_checkpoint}"]
    arguments += [f"--run_dir={tmp_path / 'run'}", *PROBE]
    arguments += [f"--data.init_args.recordings.paths=[{recording}]"]
    assert main(arguments) == 2
    assert "`SuccessProbe` must have a benchmark to play" in capsys.readouterr().err
    assert not (tmp_path / "run" / "trajectories").exists()


def test_student_that_is_probed_has_no_gradients(policy: StudentPolicy) -> None:
    request = Request(request_id="0", prompt_ids=[1, 2, 3], temperature=0.0)
    list(generate(policy, [request], Sampling(max_tokens=2)))
    assert all(p.grad is None for p in policy.student.parameters())
    assert torch.is_grad_enabled()
