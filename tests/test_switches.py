"""Attributes that hold for a pass, and adapters that are set aside by them."""

import pytest
import torch
from test_student import VOCABULARY, batch_of, student_of
from torch import nn

from lar_lightning.models.student import Student
from lar_lightning.models.switches import CASTS_INPUT, DISABLED, adapted_layers, switched


class Lamp(nn.Module):
    is_on = False


def test_values_are_back_after_a_pass_and_after_an_error() -> None:
    lamps = [Lamp(), Lamp()]
    lamps[1].is_on = True
    with switched([(lamp, "is_on", True) for lamp in lamps]):
        assert [lamp.is_on for lamp in lamps] == [True, True]

    def fail() -> None:
        with switched([(lamp, "is_on", False) for lamp in lamps]):
            assert [lamp.is_on for lamp in lamps] == [False, False]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [lamp.is_on for lamp in lamps] == [False, True]


def test_an_attribute_that_a_module_lacks_is_not_made() -> None:
    lamp = Lamp()
    with pytest.raises(AttributeError), switched([(lamp, "is_green", True)]):
        pass
    assert not hasattr(lamp, "is_green")


@pytest.fixture
def student() -> Student:
    made = student_of("llama-tied", VOCABULARY, trainable="lora")
    for parameter in made.other_parameters:  # adapters start as nothing
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def test_the_teacher_reads_as_the_model_does_whose_adapters_peft_sets_aside(
    student: Student,
) -> None:
    batch = batch_of(VOCABULARY)
    found = student.teacher_hidden(batch.teacher_ids, batch.teacher_mask)
    with torch.no_grad(), student.adapters.disable_adapter():
        expected = student._read(student.model, batch.teacher_ids, batch.teacher_mask)
        adapted = [getattr(layer, DISABLED) for layer in adapted_layers(student.model)]
    assert adapted
    assert all(adapted)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        touched = student._read(student.model, batch.teacher_ids, batch.teacher_mask)
    assert not torch.allclose(touched, expected, atol=1e-3)


def test_adapters_take_part_again_after_a_pass(student: Student) -> None:
    batch = batch_of(VOCABULARY)
    layers = adapted_layers(student.model)
    before = [(getattr(layer, DISABLED), getattr(layer, CASTS_INPUT)) for layer in layers]
    student.teacher_hidden(batch.teacher_ids, batch.teacher_mask)
    student.student_hidden(batch.student_ids, batch.student_mask)
    assert before == [(getattr(layer, DISABLED), getattr(layer, CASTS_INPUT)) for layer in layers]
    assert all(p.requires_grad for p in student.other_parameters)
