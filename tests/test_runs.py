"""A whole run of a tiny model through the command line: fit, stop, resume, export, evaluate."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import ROLLOUT_OPTIONS, make_tiny_run, tiny_recording

from lar_lightning.__main__ import main
from lar_lightning.export import load_trained_student
from lar_lightning.segments import LatentVocabulary

CONFIGS = sorted(Path("configs").rglob("*.yaml"))
MINING = ["--data.init_args.mining.max_latents=12", "--data.init_args.mining.min_support=3"]
COMMON = [
    *MINING,
    "--data.init_args.loading.batch_size=16",
    "--model.trainable=rows",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.enable_progress_bar=false",
]
SMALL = [*ROLLOUT_OPTIONS, *COMMON]


def fit_arguments(run_dir: Path, checkpoint: Path, *options: str) -> list[str]:
    own = [
        "--config",
        "configs/quickstart.yaml",
        f"--base_model={checkpoint}",
        f"--run_dir={run_dir}",
    ]
    return ["fit", *own, *SMALL, *options]


@pytest.fixture(scope="module")
def rolled_out(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of the tiny model; copy before use."""
    return make_tiny_run(tmp_path_factory.mktemp("run"), tiny_checkpoint)


@pytest.fixture
def run_dir(rolled_out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rolled_out, tmp_path / "run"))


@pytest.fixture(scope="module")
def trained(
    rolled_out: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run after ten steps; copy before changing it."""
    folder = Path(shutil.copytree(rolled_out, tmp_path_factory.mktemp("trained") / "run"))
    options = ("--trainer.max_steps=10", "--trainer.max_epochs=-1", "--model.learning_rate=1.0")
    assert main(fit_arguments(folder, tiny_checkpoint, *options)) == 0
    return folder


ON_POLICY = (
    "--trainer.max_steps=10",
    "--trainer.max_epochs=-1",
    "--trainer.log_every_n_steps=1",
    "--checkpoint.every_n_train_steps=1",
    "--model.trainable=lora",
    "--model.on_policy.share=0.66",
    "--model.on_policy.start_after=0.3",
    "--model.on_policy.max_tokens=12",
)


@pytest.fixture(scope="module")
def on_policy_run(
    rolled_out: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Three steps off-policy, then seven of which some are on-policy."""
    folder = Path(shutil.copytree(rolled_out, tmp_path_factory.mktemp("on_policy") / "run"))
    assert main(fit_arguments(folder, tiny_checkpoint, *ON_POLICY)) == 0
    return folder


def checkpoint_of(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def metrics_of(run_dir: Path, name: str) -> list[float]:
    import csv

    rows: list[tuple[int, float]] = []
    for file in sorted((run_dir / "logs").glob("version_*/metrics.csv")):
        with file.open() as lines:
            rows += [
                (int(row["step"]), float(row[name]))
                for row in csv.DictReader(lines)
                if row.get(name)
            ]
    return [value for _, value in sorted(rows)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_parses_and_does_a_fast_run(
    config: Path, run_dir: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    sources = {"data_modules.RolloutDataModule": ROLLOUT_OPTIONS}
    stacked = ["--config", str(config)] if config.parent.name == "ablations" else []
    base = Path("configs/quickstart.yaml") if stacked else config
    data = yaml.safe_load(base.read_text())["data"]["class_path"]
    if data == "data_modules.RecordedDataModule":
        recording = tiny_recording(tmp_path / "recording.jsonl")
        sources[data] = [
            f"--data.init_args.recordings.paths=[{recording}]",
            "--data.init_args.mining.max_entropy=20",  # a random model is certain of nothing
        ]
        run_dir = tmp_path / "recorded"
    place = [f"--base_model={tiny_checkpoint}", f"--run_dir={run_dir}"]
    # an overlay says last what it is about
    own = ["--config", str(base), *sources[data], *COMMON, *stacked, *place]
    assert main(["fit", *own, "--trainer.fast_dev_run=true"]) == 0


def test_training_lowers_the_held_out_loss(trained: Path) -> None:
    losses = metrics_of(trained, "val/loss_nats")
    assert losses[-1] < 0.95 * losses[0]
    assert metrics_of(trained, "val/loss_against_start")[-1] == pytest.approx(
        losses[-1] / losses[0], rel=1e-3
    )


def test_horizon_metrics_say_what_the_vocabulary_saves(trained: Path) -> None:
    from lar_lightning.trajectories import read_trajectories

    vocabulary = LatentVocabulary.load(trained)
    actions = [
        trajectory.token_ids[span.start : span.end]
        for trajectory in read_trajectories(trained / "trajectories" / "held_out.jsonl")
        for span in trajectory.action_spans
    ]
    assert metrics_of(trained, "val/horizon_tokens")[0] == sum(map(len, actions))
    assert metrics_of(trained, "val/horizon_units")[0] == sum(
        len(vocabulary.encode(action)) for action in actions
    )


def test_checkpoint_holds_rows_and_nothing_of_the_base_model(trained: Path) -> None:
    state = checkpoint_of(trained)["state_dict"]
    assert set(state) == {"student.rows.input_rows", "student.rows.output_rows"}


def test_new_rows_move_and_the_base_model_does_not(trained: Path, tiny_checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lar_lightning.student import load_student

    vocabulary = LatentVocabulary.load(trained)
    fresh = load_student(tiny_checkpoint, vocabulary)
    student = load_trained_student(
        tiny_checkpoint, vocabulary, trained / "checkpoints" / "last.ckpt"
    )
    assert (student.rows.input_rows - fresh.rows.input_rows).abs().amax(1).min() > 0
    assert (student.rows.output_rows - fresh.rows.output_rows).abs().amax(1).min() > 0
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    trained_model = dict(student.release().named_parameters())
    assert all(torch.equal(trained_model[name], value) for name, value in base.named_parameters())


@pytest.mark.parametrize("num_steps_before", [3, 8])
def test_a_run_that_was_stopped_ends_with_the_losses_of_one_that_was_not(
    num_steps_before: int,
    run_dir: Path,
    trained: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten batches are more than an epoch here.

    3 stops in the middle of the first, 8 near the end of it.
    """
    options = ("--trainer.max_steps=10", "--trainer.max_epochs=-1", "--model.learning_rate=1.0")
    every_step = ("--checkpoint.every_n_train_steps=1", "--trainer.log_every_n_steps=1")
    import lar_lightning.module as module

    step = module.LatentActionModule.training_step

    def interrupted(self: module.LatentActionModule, batch: object, batch_idx: int) -> torch.Tensor:
        if self.global_step == num_steps_before:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)  # type: ignore[arg-type]

    monkeypatch.setattr(module.LatentActionModule, "training_step", interrupted)
    with pytest.raises(SystemExit):  # Lightning ends the process on Ctrl-C
        raise SystemExit(main(fit_arguments(run_dir, tiny_checkpoint, *options, *every_step)))
    assert checkpoint_of(run_dir)["global_step"] == num_steps_before
    monkeypatch.setattr(module.LatentActionModule, "training_step", step)
    assert main(fit_arguments(run_dir, tiny_checkpoint, *options, *every_step)) == 0
    assert metrics_of(run_dir, "val/loss_nats")[0] == metrics_of(trained, "val/loss_nats")[0]
    assert len(metrics_of(run_dir, "val/loss_against_start")) > 0
    resumed, whole = checkpoint_of(run_dir), checkpoint_of(trained)
    assert resumed["global_step"] == whole["global_step"] == 10
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value)


def test_a_finished_run_is_not_trained_again(
    trained: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (trained / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    options = ("--trainer.max_steps=10", "--trainer.max_epochs=-1", "--model.learning_rate=1.0")
    assert main(fit_arguments(trained, tiny_checkpoint, *options)) == 0
    assert (trained / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    output = capsys.readouterr().out
    assert "goes on from" in output
    assert "latent vocabulary: reused" in output
    assert metrics_of(trained, "val/loss_nats")[0] > metrics_of(trained, "val/loss_nats")[-1]


def test_other_settings_for_a_trained_run_are_refused(
    trained: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("--trainer.max_steps=20", "--trainer.max_epochs=-1", "--model.learning_rate=0.5")
    assert main(fit_arguments(trained, tiny_checkpoint, *options)) == 2
    error = capsys.readouterr().err
    assert "learning_rate: 1.0 -> 0.5" in error
    assert "choose another `run_dir`" in error.replace("Choose", "choose")


def test_another_batch_size_for_a_run_that_goes_on_is_refused(
    trained: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("--trainer.max_steps=20", "--trainer.max_epochs=-1", "--model.learning_rate=1.0")
    other = "--data.init_args.loading.batch_size=8"
    assert main(fit_arguments(trained, tiny_checkpoint, *options, other)) == 2
    assert "batch_size: 16 -> 8" in capsys.readouterr().err


def test_lora_trains_adapters_too_and_merges_into_the_export(
    run_dir: Path, tiny_checkpoint: Path
) -> None:
    options = ("--trainer.max_steps=2", "--model.trainable=lora", "--model.lora_rank=4")
    assert main(fit_arguments(run_dir, tiny_checkpoint, *options)) == 0
    assert any("lora_A" in name for name in checkpoint_of(run_dir)["state_dict"])
    assert main(["export", f"--base_model={tiny_checkpoint}", f"--run_dir={run_dir}"]) == 0
    check_export(run_dir, tiny_checkpoint)


@pytest.mark.parametrize("num_steps_before", [2, 4])
def test_grounded_run_that_was_stopped_ends_like_one_that_was_not(
    num_steps_before: int,
    run_dir: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three steps of grounding, then distillation with adapters: stopped within either stage.

    The epochs of the configuration stay in force: the estimate of steps must not lose the data
    position.
    """
    options = (
        "--trainer.max_steps=5",
        "--model.trainable=lora",
        "--model.distillation.grounding_steps=3",
        "--checkpoint.every_n_train_steps=1",
    )
    other = Path(shutil.copytree(run_dir, tmp_path / "whole"))
    assert main(fit_arguments(other, tiny_checkpoint, *options)) == 0
    import lar_lightning.module as module

    step = module.LatentActionModule.training_step

    def interrupted(self: module.LatentActionModule, batch: object, batch_idx: int) -> torch.Tensor:
        if self.global_step == num_steps_before:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)  # type: ignore[arg-type]

    monkeypatch.setattr(module.LatentActionModule, "training_step", interrupted)
    with pytest.raises(SystemExit):
        raise SystemExit(main(fit_arguments(run_dir, tiny_checkpoint, *options)))
    stopped = checkpoint_of(run_dir)["state_dict"]
    adapters = [value for name, value in stopped.items() if "lora_B" in name]
    assert adapters
    assert any(value.any() for value in adapters) == (num_steps_before > 3)
    monkeypatch.setattr(module.LatentActionModule, "training_step", step)
    assert main(fit_arguments(run_dir, tiny_checkpoint, *options)) == 0
    resumed, whole = checkpoint_of(run_dir)["state_dict"], checkpoint_of(other)["state_dict"]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize("num_steps_before", [2, 5, 9])
def test_on_policy_run_that_was_stopped_ends_like_one_that_was_not(
    num_steps_before: int,
    run_dir: Path,
    on_policy_run: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped before the stage, in it, and in the second epoch."""
    import lar_lightning.module as module

    step = module.LatentActionModule.training_step

    def interrupted(self: module.LatentActionModule, batch: object, batch_idx: int) -> torch.Tensor:
        if self.global_step == num_steps_before:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)  # type: ignore[arg-type]

    monkeypatch.setattr(module.LatentActionModule, "training_step", interrupted)
    with pytest.raises(SystemExit):
        raise SystemExit(main(fit_arguments(run_dir, tiny_checkpoint, *ON_POLICY)))
    assert checkpoint_of(run_dir)["global_step"] == num_steps_before
    monkeypatch.setattr(module.LatentActionModule, "training_step", step)
    assert main(fit_arguments(run_dir, tiny_checkpoint, *ON_POLICY)) == 0
    resumed, whole = checkpoint_of(run_dir)["state_dict"], checkpoint_of(on_policy_run)
    assert all(torch.equal(resumed[name], value) for name, value in whole["state_dict"].items())
    for name in ("num_units", "num_tokens", "loss_nats"):
        values = metrics_of(on_policy_run, f"train/on_policy_{name}")
        assert values[-1:] == metrics_of(run_dir, f"train/on_policy_{name}")[-1:]


def test_on_policy_steps_begin_where_they_should_and_are_logged(on_policy_run: Path) -> None:
    sampled = metrics_of(on_policy_run, "train/on_policy")
    assert sampled == [0, 0, 0, 0, 0, 1, 1, 1, 0, 1]  # by the seed, from the fourth on
    assert not any(metrics_of(on_policy_run, "train/on_policy_skipped"))
    units = metrics_of(on_policy_run, "train/on_policy_num_units")
    tokens = metrics_of(on_policy_run, "train/on_policy_num_tokens")
    assert len(units) == 5
    assert all(0 < few <= many for few, many in zip(units, tokens, strict=True))


def test_other_on_policy_settings_for_a_trained_run_are_refused(
    on_policy_run: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    other = (*ON_POLICY, "--trainer.max_steps=12", "--model.on_policy.share=0.5")
    assert main(fit_arguments(on_policy_run, tiny_checkpoint, *other)) == 2
    assert "on_policy.share: 0.66 -> 0.5" in capsys.readouterr().err


def test_full_training_is_exported_in_the_precision_of_the_base_model(
    run_dir: Path, tiny_checkpoint: Path
) -> None:
    options = ("--trainer.max_steps=2", "--model.trainable=full", "--model.weight_decay=0.1")
    assert main(fit_arguments(run_dir, tiny_checkpoint, *options)) == 0
    state = checkpoint_of(run_dir)["state_dict"]
    assert all(value.dtype == torch.float32 for value in state.values())
    assert not any(".teacher." in name for name in state)
    assert main(["export", f"--base_model={tiny_checkpoint}", f"--run_dir={run_dir}"]) == 0
    check_export(run_dir, tiny_checkpoint)
    config = json.loads((run_dir / "export" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def check_export(run_dir: Path, base: Path) -> None:
    """The exported model answers as the student does, with nothing of ours loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    vocabulary = LatentVocabulary.load(run_dir)
    exported: Any = AutoModelForCausalLM.from_pretrained(run_dir / "export", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")
    assert exported.config.tie_word_embeddings is False
    assert (
        len(tokenizer) <= exported.config.vocab_size == len(exported.get_output_embeddings().weight)
    )
    text = "def f(x):\n    return x" + "".join(latent.text for latent in vocabulary.latents)
    units = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert (units >= vocabulary.base_size).any()
    assert tokenizer.decode(units[0], skip_special_tokens=True) == text
    student = load_trained_student(base, vocabulary, run_dir / "checkpoints" / "last.ckpt")
    with torch.no_grad():
        hidden = student.student_hidden(units, torch.ones_like(units))
        heads = student.heads
        logits = torch.cat(
            [hidden.float() @ heads.base.float().T, hidden.float() @ heads.latent.T], 2
        )
        found = exported(input_ids=units).logits.float()
    torch.testing.assert_close(found[..., : logits.shape[2]], logits, atol=0.1, rtol=0.05)


def test_export_is_an_ordinary_checkpoint(trained: Path, tiny_checkpoint: Path) -> None:
    assert main(["export", f"--base_model={tiny_checkpoint}", f"--run_dir={trained}"]) == 0
    check_export(trained, tiny_checkpoint)


def test_evaluation_compares_both_methods_and_is_reused(
    trained: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [
        "evaluate",
        f"--base_model={tiny_checkpoint}",
        f"--run_dir={trained}",
        "--benchmark=humaneval",
    ]
    arguments += [
        "--rollouts.num_held_out=4",
        "--evaluation.max_tokens=12",
        "--evaluation.engine=transformers",
    ]
    assert main(arguments) == 0
    rows = json.loads((trained / "results.json").read_text())
    assert [row["method"] for row in rows] == ["vanilla", "lar"]
    contract = {
        *(
            "method",
            "benchmark",
            "score",
            "num_tasks",
            "prompt_tokens",
            "generated_units",
            "expanded_tokens",
        ),
        *(
            "latents_emitted",
            "adoption_rate",
            "wall_clock_seconds",
            "expanded_tokens_per_second",
            "agreement",
        ),
    }
    assert all(contract <= set(row) for row in rows)
    assert rows[0]["latents_emitted"] == 0
    assert all(row["expanded_tokens"] <= 4 * 12 for row in rows)
    capsys.readouterr()
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "evaluate (lar): 2 runs reused, 0 to make" in output
    assert main(["report", f"--base_model={tiny_checkpoint}", f"--run_dir={trained}"]) == 0
    assert (trained / "report.html").read_text().startswith("<!")


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_other_trainer_verbs_read_the_last_checkpoint(
    verb: str, trained: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    assert (
        main([verb, *fit_arguments(trained, tiny_checkpoint, "--model.learning_rate=1.0")[1:]]) == 0
    )
    assert f"{verb}: goes on from" in capsys.readouterr().out


def test_a_checkpoint_of_another_base_model_is_refused(
    trained: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: value * 1.01 for name, value in weights.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    assert main(["export", f"--base_model={other}", f"--run_dir={run}"]) == 2
    assert "base_model" in capsys.readouterr().err
    assert not (run / "export" / "config.json").exists() or (trained / "export").exists()


def test_saved_configuration_can_be_used_again(trained: Path) -> None:
    saved = next((trained / "logs").glob("version_*/config.yaml"))
    content = yaml.safe_load(saved.read_text())
    assert content["data"]["class_path"] == "data_modules.RolloutDataModule"
