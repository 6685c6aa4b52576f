"""A whole run of a tiny model through the command line: fit, export, evaluate."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import ROLLOUT_OPTIONS, tiny_recording
from whole_runs import COMMON, checkpoint_of, fit_arguments, metrics_of

from lar_lightning.__main__ import main
from lar_lightning.export.checkpoint import load_trained_student
from lar_lightning.segments import LatentVocabulary

CONFIGS = [
    config
    for config in sorted(Path("configs").rglob("*.yaml"))
    if config.parent.name not in ("tables", "strategy")
]
"""Those of `fit`; the grids are in `test_table_configs.py`, sharding in `test_sharding.py`."""


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_parses_and_does_a_fast_run(
    config: Path, run_dir: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    sources = {"data_modules.RolloutDataModule": [*ROLLOUT_OPTIONS]}
    is_whole = "class_path" in yaml.safe_load(config.read_text()).get("data", {})
    stacked = [] if is_whole else ["--config", str(config)]
    base = config if is_whole else Path("configs/quickstart.yaml")
    content = yaml.safe_load(base.read_text())["data"]
    data = content["class_path"]
    mining = "--data.init_args.mining"
    uncertain = [f"{mining}.max_entropy=20", f"{mining}.min_certain_share=0"]  # a random model
    if data == "data_modules.RecordedDataModule":
        recording = tiny_recording(tmp_path / "recording.jsonl")
        sources[data] = [f"--data.init_args.recordings.paths=[{recording}]", *uncertain]
        run_dir = tmp_path / "recorded"
    if "style" in content["init_args"].get("rollouts", {}):  # rollouts of its own, in turns
        few = ("num_training=4", "engine=transformers", "max_tokens=8")
        sources[data] += [*uncertain, *(f"--data.init_args.rollouts.{option}" for option in few)]
        sources[data] += ["--data.init_args.loading.max_tokens=4000"]
        run_dir = tmp_path / "turns"
    place = [f"--base_model={tiny_checkpoint}", f"--run_dir={run_dir}", "--benchmark=humaneval"]
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

    from lar_lightning.models.student import load_student

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


def test_lora_trains_adapters_too_and_merges_into_the_export(
    run_dir: Path, tiny_checkpoint: Path
) -> None:
    options = ("--trainer.max_steps=2", "--model.trainable=lora", "--model.lora_rank=4")
    assert main(fit_arguments(run_dir, tiny_checkpoint, *options)) == 0
    assert any("lora_A" in name for name in checkpoint_of(run_dir)["state_dict"])
    assert main(["export", f"--base_model={tiny_checkpoint}", f"--run_dir={run_dir}"]) == 0
    check_export(run_dir, tiny_checkpoint)


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
    assert "evaluate (lar on humaneval, run 1): 4 episodes reused, 0 to play" in output
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
