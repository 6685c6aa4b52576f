import pytest
import torch
from test_student import ARCHITECTURES, VOCABULARY, batch_of, module_of, student_of

from lar_lightning.losses.grounding import grounding_loss
from lar_lightning.models.student import Student


def terms_of(student: Student) -> tuple[torch.Tensor, torch.Tensor]:
    batch = batch_of(VOCABULARY)
    teacher, read = module_of(student)._hidden(batch, is_grounding=True)
    error, nats, _ = grounding_loss(
        teacher[batch.teacher_rows],
        read[batch.student_rows],
        student.heads,
        batch.targets,
        student.folding,
    )
    return error, nats


@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
def test_each_term_reaches_its_own_rows(trainable: str) -> None:
    student = student_of("llama-tied", VOCABULARY, trainable=trainable)
    error, nats = terms_of(student)
    parameters = list(student.rows.parameters())
    by_error = torch.autograd.grad(error, parameters, retain_graph=True, allow_unused=True)
    by_nats = torch.autograd.grad(nats, parameters, allow_unused=True)
    assert by_error[0] is not None
    assert by_error[0].abs().sum() > 0
    assert by_error[1] is None
    assert by_nats[0] is None
    assert by_nats[1].abs().sum() > 0


def test_adapters_are_not_read_while_rows_are_grounded() -> None:
    student = student_of("llama-tied", VOCABULARY, trainable="lora")
    before = [float(term.detach()) for term in terms_of(student)]
    with torch.no_grad():
        for parameter in student.other_parameters:
            parameter.normal_()
    torch.testing.assert_close([float(term.detach()) for term in terms_of(student)], before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_grounding_draws_hidden_states_to_the_teachers(name: str) -> None:
    student = student_of(name, VOCABULARY)
    optimizer = torch.optim.Adam(student.rows.parameters(), lr=0.05)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        error, nats = terms_of(student)
        (error + nats).backward()
        optimizer.step()
        values.append((float(error.detach()), float(nats.detach())))
    assert values[-1][0] < 0.9 * values[0][0]
    assert values[-1][1] < 0.98 * values[0][1]


def test_error_counts_positions_behind_latents_only() -> None:
    batch = batch_of(VOCABULARY)
    student = student_of("llama-tied", VOCABULARY)
    teacher = torch.randn(len(batch.targets), 32)
    behind = batch.targets.num_since_latent >= 0
    read = torch.where(behind[:, None], teacher, teacher + 1.0)
    error, _, _ = grounding_loss(teacher, read, student.heads, batch.targets, student.folding)
    assert behind.any()
    assert not behind.all()
    assert float(error) == 0
