"""What the student writes, against its own forward pass over the same units."""

import pytest
import torch
from test_student import ARCHITECTURES, VOCABULARY, student_of, unit_logits_of
from torch import Tensor

from lar_lightning.models.student import Student
from lar_lightning.training.sampling import Sample, cut_at_limit, sample_units

ALL = pytest.mark.parametrize("name", ARCHITECTURES)
PROMPTS = [[3, 0, 4, 2], [1], [3, 5, 5, 0, 1, 6, 2]]


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved_student(name: str, trainable: str = "lora") -> Student:
    """With adapters and rows that do something."""
    student = student_of(name, VOCABULARY, trainable=trainable)
    random = chance(1)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=random)
    return student


def forced(student: Student, prompt: list[int], units: list[int]) -> Tensor:
    """Logits at the rows that predict `units`, from one pass without padding or cache."""
    with torch.no_grad():
        logits = unit_logits_of(student, torch.tensor([[*prompt, *units]]))
    return logits[0, len(prompt) - 1 : -1]


@ALL
@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
def test_greedy_units_are_those_of_the_forward_pass(name: str, trainable: str) -> None:
    """All prompts in one batch, padded on the left, with cached keys and values."""
    student = moved_student(name, trainable)
    samples = sample_units(
        student, PROMPTS, chance(), stop_units=[], max_tokens=12, temperature=0.0
    )
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        assert sample.units == forced(student, prompt, sample.units).argmax(1).tolist()


def test_samples_follow_the_distribution_of_the_student() -> None:
    student, count, temperature = moved_student("llama-untied"), 4000, 1.5
    samples = sample_units(
        student,
        [PROMPTS[0]] * count,
        chance(),
        stop_units=[],
        max_tokens=1,
        temperature=temperature,
    )
    drawn = torch.bincount(torch.tensor([sample.units[0] for sample in samples]), minlength=7)
    expected = (forced(student, PROMPTS[0], [0]) / temperature).softmax(1)[0]
    assert ((drawn / count) - expected).abs().max() < 0.03
    assert (drawn[4:] > 0).any()


def test_turn_end_ends_one_action_and_the_others_go_on() -> None:
    student = moved_student("qwen3-tied")
    free = sample_units(student, PROMPTS, chance(), stop_units=[], max_tokens=12)
    stop = free[0].units[2]
    found = sample_units(student, PROMPTS, chance(), stop_units=[stop], max_tokens=12)
    for sample, whole in zip(found, free, strict=True):
        end = whole.units.index(stop) + 1 if stop in whole.units else len(whole.units)
        assert sample == Sample(units=whole.units[:end], is_finished=stop in whole.units)


def test_limit_counts_expanded_tokens_and_only_the_last_unit_crosses_it() -> None:
    student = moved_student("mistral")
    for limit in (1, 2, 7):
        samples = sample_units(student, PROMPTS * 5, chance(), stop_units=[], max_tokens=limit)
        for sample in samples:
            lengths = [len(segment) for segment in VOCABULARY.segments]
            tokens = [lengths[unit - 4] if unit >= 4 else 1 for unit in sample.units]
            assert sum(tokens) >= limit > sum(tokens[:-1])
            assert not sample.is_finished


def test_cut_of_a_longer_action_is_the_action_under_the_limit() -> None:
    student = moved_student("llama-tied")
    free = sample_units(student, PROMPTS, chance(), stop_units=[], max_tokens=20, temperature=0.0)
    stop = free[0].units[3]
    options = {"stop_units": [stop], "temperature": 0.0}
    whole = sample_units(student, PROMPTS, chance(), max_tokens=20, **options)
    for limit in range(1, 21):
        limited = sample_units(student, PROMPTS, chance(), max_tokens=limit, **options)
        for sample, longer in zip(limited, whole, strict=True):
            assert cut_at_limit(student, longer.units, [stop], limit) == sample


def test_draw_depends_on_the_generator_alone() -> None:
    student = moved_student("llama-tied")
    torch.manual_seed(5)
    first = sample_units(student, PROMPTS, chance(7), stop_units=[], max_tokens=9)
    torch.manual_seed(6)
    assert first == sample_units(student, PROMPTS, chance(7), stop_units=[], max_tokens=9)
    assert first != sample_units(student, PROMPTS, chance(8), stop_units=[], max_tokens=9)


def test_sampling_leaves_gradients_of_the_following_pass_alone() -> None:
    """Autocast must not hand on weights that it has cast where none was wanted."""
    student = moved_student("llama-untied")
    for parameter in student.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    ids = torch.tensor(PROMPTS[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample_units(student, PROMPTS, chance(), stop_units=[], max_tokens=4)
        hidden = student.student_hidden(ids, torch.ones_like(ids))
        hidden.float().square().sum().backward()
    grads = [parameter.grad for parameter in student.other_parameters]
    assert all(grad is not None and grad.any() for grad in grads)
