import pytest
import torch
from torch import Tensor

from lar_lightning.errors import SettingError
from lar_lightning.losses.divergences import Banned, binary_divergence, divergence
from lar_lightning.losses.folding import Folding
from lar_lightning.settings import DistillationSettings

EMPTY = torch.empty(0, dtype=torch.int64)
NOTHING = Banned(rows=EMPTY, tokens=EMPTY)
SOME = Banned(rows=torch.tensor([0, 0, 3]), tokens=torch.tensor([1, 5, 2]))
EVERY = [
    DistillationSettings(divergence="forward_kl"),
    DistillationSettings(divergence="forward_kl", temperature=2.0),
    DistillationSettings(divergence="reverse_kl", temperature=0.5),
    DistillationSettings(divergence="jsd", beta=0.2),
]


def logits(seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(4, 6, dtype=torch.float64, generator=random)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(1)


def jsd(beta: float) -> DistillationSettings:
    return DistillationSettings(divergence="jsd", beta=beta)


def test_reverse_kl_and_jsd_equal_their_definitions() -> None:
    p, q = logits(0).softmax(1), logits(1).softmax(1)
    reverse = divergence(logits(0), logits(1), NOTHING, EVERY[2])
    tempered = [(2 * part).softmax(1) for part in (logits(1), logits(0))]
    torch.testing.assert_close(reverse, 0.25 * kl(*tempered))
    mixture = 0.2 * p + 0.8 * q
    expected = 0.2 * kl(p, mixture) + 0.8 * kl(q, mixture)
    torch.testing.assert_close(divergence(logits(0), logits(1), NOTHING, EVERY[3]), expected)


def test_jsd_tends_to_the_forward_kl_and_the_reverse_kl() -> None:
    p, q = logits(0).softmax(1), logits(1).softmax(1)
    near_0 = divergence(logits(0), logits(1), NOTHING, jsd(1e-6)) / 1e-6
    near_1 = divergence(logits(0), logits(1), NOTHING, jsd(1 - 1e-6)) / 1e-6
    torch.testing.assert_close(near_0, kl(p, q), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(near_1, kl(q, p), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jsd_is_symmetric_where_beta_changes_sides(beta: float) -> None:
    torch.testing.assert_close(
        divergence(logits(0), logits(1), NOTHING, jsd(beta)),
        divergence(logits(1), logits(0), NOTHING, jsd(1 - beta)),
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_temperature_scales_the_gradient_by_t_times_the_difference(temperature: float) -> None:
    student = logits(1).requires_grad_()
    settings = DistillationSettings(temperature=temperature)
    divergence(logits(0), student, NOTHING, settings).sum().backward()
    tempered = [(part.detach() / temperature).softmax(1) for part in (student, logits(0))]
    torch.testing.assert_close(student.grad, temperature * (tempered[0] - tempered[1]))


@pytest.mark.parametrize("settings", EVERY, ids=str)
@pytest.mark.parametrize("banned", [NOTHING, SOME], ids=["free", "banned"])
def test_divergence_is_zero_exactly_at_the_teacher_without_banned_tokens(
    settings: DistillationSettings, banned: Banned
) -> None:
    teacher = logits(0)
    same = banned.removed_from(teacher) + 3.0
    zero = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(
        divergence(teacher, same, banned, settings), zero, atol=1e-10, rtol=0
    )
    other = divergence(teacher, logits(1), banned, settings)
    assert (other > 1e-3).all()
    assert other.isfinite().all()


def test_mass_on_banned_tokens_costs_every_divergence_alike() -> None:
    """A student that is the teacher but for banned mass pays -log of what it leaves."""
    teacher = logits(0)
    left = teacher.softmax(1).index_put((SOME.rows, SOME.tokens), torch.zeros(()).double()).sum(1)
    for settings in (EVERY[0], DistillationSettings(divergence="reverse_kl"), jsd(0.3)):
        found = divergence(teacher, teacher, SOME, settings)
        torch.testing.assert_close(found, -left.log(), atol=1e-10, rtol=1e-10)


def test_student_that_folds_to_its_teacher_is_at_zero_at_every_temperature() -> None:
    """The trap: tempering units before folding favours tokens that many latents begin with."""
    folding = Folding([(0, 1), (0, 2), (3, 1)], 6)
    base, latent = logits(1), logits(2)[:, :3]
    teacher = base.index_copy(1, folding.first_tokens, folding(base, latent))
    settings = DistillationSettings(temperature=3.0)
    zero = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(
        divergence(teacher, teacher, NOTHING, settings), zero, atol=1e-10, rtol=0
    )
    tempered_first = base.index_copy(1, folding.first_tokens, 3 * folding(base / 3, latent / 3))
    assert (divergence(teacher, tempered_first, NOTHING, settings) > 1e-2).all()


@pytest.mark.parametrize("temperature", [1.0, 10.0, 100.0])
def test_bernoulli_of_a_certain_target_is_the_negative_log_likelihood(temperature: float) -> None:
    log_probability = torch.tensor([0.999, 0.5, 1e-4]).double().log()
    found = binary_divergence(torch.ones(3).double(), log_probability, temperature)
    torch.testing.assert_close(found, -log_probability)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_bernoulli_equals_its_definition_and_vanishes_at_the_target(temperature: float) -> None:
    target, probability = torch.tensor([0.2, 0.9]).double(), torch.tensor([0.5, 0.4]).double()
    p, q = target ** (1 / temperature), probability ** (1 / temperature)
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    found = binary_divergence(target, probability.log(), temperature)
    torch.testing.assert_close(found, temperature * expected, rtol=1e-3, atol=1e-4)
    assert binary_divergence(target, target.log(), temperature).abs().max() < 1e-12


def test_bernoulli_stays_finite_at_the_ends() -> None:
    log_probability = torch.tensor([0.0, -80.0], requires_grad=True)
    for target in (torch.zeros(2), torch.ones(2), torch.full((2,), 0.5)):
        (slope,) = torch.autograd.grad(
            binary_divergence(target, log_probability, 100.0).sum(), log_probability
        )
        assert slope.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("split_temperature", -1.0),
        ("beta", 0.0),
        ("beta", 1.0),
        ("split_weight", -0.1),
        ("weight_after_latent", 0.0),
        ("num_rows_after_latent", -1),
        ("grounding_steps", -1),
    ],
)
def test_settings_outside_their_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(SettingError, match=rf"distillation\.{name}"):
        DistillationSettings(**{name: value})  # type: ignore[arg-type]
