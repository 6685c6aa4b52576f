"""Fine-tuning on answers: what counts in the loss, what is learned, and what is left behind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lar_lightning.agents.supervised import trainer as supervised_trainer
from lar_lightning.agents.supervised.fine_tuning import STATE_FILE, fine_tune
from lar_lightning.agents.supervised.samples import (
    EncodedSample,
    Sample,
    conversation_ids,
    encode_sample,
    micro_batches,
    padded,
    split_groups,
    step_samples,
    turn_end,
)
from lar_lightning.agents.supervised.trainer import (
    SupervisedSettings,
    SupervisedTrainer,
    answer_loss,
    learning_rate_at,
)
from lar_lightning.errors import SettingError
from lar_lightning.tokenizer import decode, render_chat

SETTINGS = SupervisedSettings(learning_rate=3e-3, num_epochs=2, batch_size=4)
SAMPLES = [
    Sample(
        messages=({"role": "user", "content": f"Complete the function {'again ' * (i % 3)}{i}."},),
        answer="The function returns the text, and the length of the text.",
        group=f"task {i}",
    )
    for i in range(12)
]


def encoded(length: int, group: str = "") -> EncodedSample:
    return EncodedSample(ids=tuple(range(1, length + 1)), num_prompt=2, group=group)


def test_the_turn_end_is_the_template_s(tiny_tokenizer: Any) -> None:
    assert turn_end(tiny_tokenizer) == tiny_tokenizer.eos_token_id


def test_targets_are_the_answer_and_its_end_alone(tiny_tokenizer: Any) -> None:
    end = turn_end(tiny_tokenizer)
    samples = [encode_sample(tiny_tokenizer, sample, end) for sample in SAMPLES[:3]]
    ids, mask, targets = padded(samples)
    for row, sample in enumerate(samples):
        wanted = targets[row][targets[row] >= 0].tolist()
        assert decode(tiny_tokenizer, wanted) == SAMPLES[row].answer + "<|im_end|>"
        first = int((targets[row] >= 0).nonzero()[0])
        assert first == sample.num_prompt - 1
        assert ids[row, first + 1] == wanted[0]
        assert mask[row].sum() == len(sample.ids)


def test_a_prompt_of_one_message_is_what_the_policy_reads(tiny_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Complete the function."}]
    ids, _ = render_chat(tiny_tokenizer, messages)
    assert conversation_ids(tiny_tokenizer, messages, turn_end(tiny_tokenizer)) == ids


def test_earlier_turns_are_read_whole(tiny_tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "<think>left</think> right"},
        {"role": "user", "content": "And?"},
    ]
    ids = conversation_ids(tiny_tokenizer, messages, turn_end(tiny_tokenizer))
    assert decode(tiny_tokenizer, ids) == (
        "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n<think>left</think> right"
        "<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_padding_and_batches_do_not_move_the_loss(
    tiny_checkpoint: Path, tiny_tokenizer: Any
) -> None:
    trainer = SupervisedTrainer(tiny_checkpoint, SETTINGS)
    end = turn_end(tiny_tokenizer)
    samples = [encode_sample(tiny_tokenizer, sample, end) for sample in SAMPLES[:3]]
    together = answer_loss(trainer.model, samples).item()
    alone = sum(answer_loss(trainer.model, [sample]).item() for sample in samples)
    assert together == pytest.approx(alone, rel=1e-2)


def test_groups_are_validated_on_whole_or_not_at_all() -> None:
    samples = [encoded(3, group=str(i // 3)) for i in range(30)]
    training, validation = split_groups(samples, 0.2, seed=1)
    assert {s.group for s in training}.isdisjoint({s.group for s in validation})
    assert len({s.group for s in validation}) == 2
    assert split_groups(samples[:3], 0.5, seed=1) == (samples[:3], [])


def test_an_epoch_takes_each_sample_once() -> None:
    for epoch in range(2):
        steps = [step_samples(11, 4, 0, epoch * 3 + place) for place in range(3)]
        assert sorted(index for step in steps for index in step) == list(range(11))
    assert step_samples(11, 4, 0, 0) != step_samples(11, 4, 0, 3)


def test_micro_batches_stay_below_the_limit_and_hold_all() -> None:
    samples = [encoded(length) for length in (3, 50, 7, 7, 9, 30)]
    batches = list(micro_batches(samples, 32))
    assert sorted(len(s.ids) for batch in batches for s in batch) == [3, 7, 7, 9, 30, 50]
    assert all(
        len(batch) == 1 or len(batch) * max(len(s.ids) for s in batch) <= 32 for batch in batches
    )


def test_the_learning_rate_rises_to_its_height_and_falls_as_a_cosine() -> None:
    settings = SupervisedSettings(learning_rate=1.0, warmup_share=0.1)
    rates = [learning_rate_at(step, 100, settings) for step in range(100)]
    assert rates[9] == rates[10] == 1.0
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_tuning_lowers_the_loss_and_the_checkpoint_is_an_ordinary_one_that_is_reused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tuned = fine_tune(tiny_checkpoint, SAMPLES, tmp_path, SETTINGS)
    assert tuned.loss_after < 0.8 * tuned.loss_before
    assert (tuned.num_training, tuned.num_validation, tuned.num_too_long) == (11, 1, 0)
    model: Any = AutoModelForCausalLM.from_pretrained(tuned.checkpoint, dtype=torch.bfloat16)
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in base.named_parameters()}
    assert model.config.tie_word_embeddings
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    projection = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.get_parameter(projection), base.get_parameter(projection))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]
    capsys.readouterr()
    leaner = replace(SETTINGS, tokens_per_batch=64)  # memory alone: nothing is trained anew
    for settings in (SETTINGS, leaner):
        assert fine_tune(tiny_checkpoint, SAMPLES, tmp_path, settings) == tuned
        assert "reused" in capsys.readouterr().out


def test_the_merged_checkpoint_has_the_loss_that_was_reported(
    tiny_checkpoint: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    settings = replace(SETTINGS, validation_share=0.0)
    tuned = fine_tune(tiny_checkpoint, SAMPLES, tmp_path, settings)
    end = turn_end(tiny_tokenizer)
    samples = [encode_sample(tiny_tokenizer, sample, end) for sample in SAMPLES]
    # Adapters begin at zero: a fresh trainer is the merged model.
    assert SupervisedTrainer(tuned.checkpoint, settings).loss(samples) == pytest.approx(
        tuned.loss_after, rel=0.05
    )


def test_an_interrupted_training_goes_on_to_the_same_weights(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    whole = fine_tune(tiny_checkpoint, SAMPLES, tmp_path / "whole", SETTINGS)
    monkeypatch.setattr(supervised_trainer, "SECONDS_BETWEEN_SAVES", 0.0)
    step = SupervisedTrainer.step
    seen: list[int] = []

    def stopping(self: SupervisedTrainer, *arguments: Any) -> float:
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(1)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(tiny_checkpoint, SAMPLES, tmp_path / "stopped", SETTINGS)
    assert (tmp_path / "stopped" / STATE_FILE).exists()
    stopped = fine_tune(tiny_checkpoint, SAMPLES, tmp_path / "stopped", SETTINGS)
    assert stopped.loss_before == whole.loss_before
    one, two = (load_file(t.checkpoint / "model.safetensors") for t in (whole, stopped))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_samples_that_are_too_long_are_left_out_and_none_left_is_said(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="`max_length` must hold a sample, got 5 where the sho"):
        fine_tune(tiny_checkpoint, SAMPLES, tmp_path, replace(SETTINGS, max_length=5))


@pytest.mark.parametrize(
    "setting",
    [
        {"lora_rank": 0},
        {"learning_rate": 0.0},
        {"warmup_share": 1.0},
        {"num_epochs": 0},
        {"tokens_per_batch": 0},
    ],
)
def test_settings_that_cannot_work_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        SupervisedSettings(**setting)
