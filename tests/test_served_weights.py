"""The student's weights as an engine is given them, against those that are exported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_sampling import moved_student
from test_student import ARCHITECTURES, VOCABULARY, unit_logits_of

from lar_lightning.export.checkpoint import extended_model
from lar_lightning.training.served_weights import served_weights, write_served

ALL = pytest.mark.parametrize("name", ARCHITECTURES)
NUM_UNITS = VOCABULARY.base_size + len(VOCABULARY)


@ALL
@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
def test_served_weights_are_those_of_the_export_without_spare_rows(
    name: str, trainable: str
) -> None:
    student = moved_student(name, trainable)
    before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    served = dict(served_weights(student))
    assert all(torch.equal(before[key], tensor) for key, tensor in student.state_dict().items())
    rows = student.rows
    model = extended_model(student.release(), rows.input_rows, rows.output_rows, student.base_size)
    exported = {key: parameter.detach() for key, parameter in model.named_parameters()}
    assert served.keys() == exported.keys()
    matrices = {"model.embed_tokens.weight", "lm_head.weight"}
    for key, tensor in served.items():
        wanted = exported[key][:NUM_UNITS] if key in matrices else exported[key]
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
def test_what_does_not_change_in_training_is_not_among_the_changed(trainable: str) -> None:
    """Layers can be given whole only, and adapters are on all of them."""
    student = moved_student("qwen3-tied", trainable)
    changed = dict(served_weights(student, changed_only=True))
    everything = dict(served_weights(student))
    matrices = {"model.embed_tokens.weight", "lm_head.weight"}
    assert changed.keys() == (matrices if trainable == "rows" else everything.keys())
    assert all(torch.equal(tensor, everything[key]) for key, tensor in changed.items())


def test_precision_of_the_frozen_model_is_that_of_what_is_served() -> None:
    student = moved_student("llama-tied")
    for parameter in student.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    assert {tensor.dtype for _, tensor in served_weights(student)} == {torch.bfloat16}


def test_written_checkpoint_is_untied_and_stops_where_the_student_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    student = moved_student("qwen3-tied")
    student.model.generation_config.eos_token_id = [3, 1]
    write_served(student, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == dict(served_weights(student)).keys()
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (NUM_UNITS, False)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 3]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[3, 0, 4, 2, 6]])
    with torch.no_grad():
        found, wanted = model(input_ids=ids).logits, unit_logits_of(student, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
