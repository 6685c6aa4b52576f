"""The on-policy terms against an enumeration of the toy language, and the stage in a real model."""

from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_student import ARCHITECTURES, EMPTY, VOCABULARY, Steps, batch_of, module_of, student_of
from torch import Tensor
from toy_language import (
    ALPHABET,
    END,
    LONGEST,
    RandomStudent,
    RandomTeacher,
    ids,
    strings,
    trajectory_of,
    vocabulary_of,
)

from lar_lightning.alignment import align, pending_at_edges
from lar_lightning.batches import collate
from lar_lightning.errors import SettingError
from lar_lightning.losses.divergences import NEVER
from lar_lightning.losses.folding import Folding, RowTerms, row_terms
from lar_lightning.losses.offers import OfferTarget
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import DistillationSettings, OnPolicySettings
from lar_lightning.training.on_policy import (
    OnPolicyBatch,
    OnPolicyStage,
    Prompt,
    collate_samples,
    pair_sample,
    prompts_of,
)
from lar_lightning.training.sampling import Sample
from lar_lightning.trajectories import Span, Trajectory

LATENT_SETS = [
    ("ab",),
    ("ab", "abcb", "ca", "bbc", "caab"),
    ("aa", "aaa", "ba"),
    ("abca", "bc"),
    ("ab", "ac", "abc", "acb"),
    ("aab", "aac", "ba", "cc"),
]
SETS = pytest.mark.parametrize("segments", LATENT_SETS, ids="-".join)
FORMS = {
    name: DistillationSettings(divergence=name)  # type: ignore[arg-type]
    for name in ("reverse_kl", "jsd", "forward_kl")
}
NOTHING = np.asarray([ALPHABET.index(END)])
Units = tuple[int, ...]


class Enumeration:
    """All that a student can write, as one batch, before a random teacher."""

    def __init__(self, segments: tuple[str, ...], teacher_seed: int) -> None:
        self.vocabulary = vocabulary_of(*segments)
        self.num_units = len(ALPHABET) + len(self.vocabulary)
        self.teacher = RandomTeacher(teacher_seed)
        self.written = list(self._written(()))
        prompt = Prompt(teacher_ids=NOTHING, student_ids=NOTHING)
        paired = [pair_sample(self.vocabulary, prompt, units) for units in self.written]
        self.batch = collate_samples(self.vocabulary, paired)
        # The toy teacher's hidden states are its logits.
        width = self.batch.pairs.teacher_ids.shape[1]
        hidden = torch.zeros(len(self.written), width, len(ALPHABET), dtype=torch.float64)
        for index, units in enumerate(self.written):
            text = self.text_of(units)
            for position in range(len(text)):
                hidden[index, position] = self.teacher(text[:position])
        self.teacher_hidden = hidden.flatten(0, 1)
        self.target = self.batch.target(self.teacher_hidden, torch.eye(4).double(), 7)
        self.prefixes = [units[:row] for units in self.written for row in range(len(units))]
        self.owner = torch.repeat_interleave(
            torch.arange(len(self.written)), torch.tensor([len(units) for units in self.written])
        )

    def text_of(self, units: Units) -> str:
        return "".join(ALPHABET[token] for token in self.vocabulary.expand(units))

    def can_follow(self, prefix: Units) -> list[int]:
        room = LONGEST - len(self.vocabulary.expand(prefix))
        lengths = self.vocabulary.lengths(range(self.num_units))
        end = ALPHABET.index(END)
        return [u for u, length in enumerate(lengths) if u == end or length <= room]

    def _written(self, prefix: Units) -> Iterator[Units]:
        for unit in self.can_follow(prefix):
            if unit == ALPHABET.index(END):
                yield (*prefix, unit)
            else:
                yield from self._written((*prefix, unit))

    def masses(self) -> dict[Units, np.ndarray]:
        """Q: the teacher's probability of each next unit after each prefix that encoding writes."""
        found: dict[Units, np.ndarray] = {}
        for text in strings():
            units = self.vocabulary.encode(ids(text))
            probability = float(self.teacher.log_probability(text).exp())
            for row, unit in enumerate(units):
                mass = found.setdefault(tuple(units[:row]), np.zeros(self.num_units))
                mass[unit] += probability
        return found

    def terms(
        self, logits: Tensor, settings: DistillationSettings, target: OfferTarget | None = None
    ) -> RowTerms:
        pairs = self.batch.pairs
        return row_terms(
            self.teacher_hidden[pairs.teacher_rows],
            logits[:, :4],
            logits[:, 4:],
            pairs.targets,
            Folding(self.vocabulary.segments, 4),
            settings,
            target or self.target,
        )


@cache
def enumeration(segments: tuple[str, ...], teacher_seed: int = 0) -> Enumeration:
    return Enumeration(segments, teacher_seed)


def first_token_mass(vocabulary: LatentVocabulary, mass: np.ndarray) -> np.ndarray:
    firsts = [vocabulary.expand([unit])[0] for unit in range(len(mass))]
    return np.bincount(firsts, weights=mass, minlength=4)


@SETS
@pytest.mark.parametrize("teacher_seed", [0, 1])
def test_targets_are_those_of_the_encoded_teacher(
    segments: tuple[str, ...], teacher_seed: int
) -> None:
    """On every row behind what encoding can write, for every text that may follow."""
    toy = enumeration(segments, teacher_seed)
    masses, targets = toy.masses(), toy.batch.pairs.targets
    teacher = toy.teacher_hidden[toy.batch.pairs.teacher_rows].clone()
    teacher[targets.banned_rows, targets.banned_tokens] = NEVER
    teacher[toy.target.open_rows, toy.target.open_tokens] = NEVER
    found = teacher.softmax(1).numpy()
    num_compared = 0
    for row, prefix in enumerate(toy.prefixes):
        if prefix in masses:
            expected = first_token_mass(toy.vocabulary, masses[prefix])
            expected[toy.target.open_tokens[toy.target.open_rows == row]] = 0
            if expected.sum() > 1e-12:
                np.testing.assert_allclose(found[row], expected / expected.sum(), atol=1e-9)
                num_compared += 1
    assert num_compared > 20
    texts = [toy.vocabulary.segments[latent] for latent in range(len(toy.vocabulary))]
    for row, latent, log_t in zip(
        toy.target.rows.tolist(),
        toy.target.latents.tolist(),
        toy.target.log_probabilities.tolist(),
        strict=True,
    ):
        prefix, segment = toy.prefixes[row], texts[latent]
        if prefix in masses:
            alike = [
                masses[prefix][4 + other]
                for other, text in enumerate(texts)
                if text[: len(segment)] == segment
            ]
            total = first_token_mass(toy.vocabulary, masses[prefix])[segment[0]]
            if total > 1e-12:
                assert np.exp(log_t) == pytest.approx(sum(alike) / total, abs=1e-9)


@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
@SETS
def test_student_that_is_the_encoded_teacher_is_at_zero(
    segments: tuple[str, ...], settings: DistillationSettings
) -> None:
    toy = enumeration(segments)
    masses = toy.masses()
    is_written = [prefix in masses for prefix in toy.prefixes]
    uniform = np.ones(toy.num_units)
    with np.errstate(divide="ignore"):
        logits = torch.tensor(
            np.stack([np.log(masses.get(prefix, uniform)) for prefix in toy.prefixes])
        ).clamp_min(NEVER)
    terms = toy.terms(logits, settings)
    # Where the text must end the teacher's mass beyond is a rounding error, and so are its shares.
    probability = torch.tensor([masses.get(p, uniform).sum() for p in toy.prefixes])
    rows = torch.tensor(is_written) & (probability > 1e-9)
    assert rows.sum() > 20
    assert (terms.folded + terms.split)[rows].abs().max() < 2e-5


@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
def test_every_term_is_at_least_zero_and_random_students_are_above(
    settings: DistillationSettings,
) -> None:
    for segments in LATENT_SETS:
        toy = enumeration(segments)
        student = RandomStudent(5, toy.num_units)
        terms = toy.terms(torch.stack([student(prefix) for prefix in toy.prefixes]), settings)
        assert terms.folded.min() > -1e-9
        assert terms.split.min() > -1e-9
        assert terms.folded.mean() > 0.1
        assert terms.split.mean() > 0.01


def test_expectation_over_what_the_student_writes_is_the_divergence_of_its_definition() -> None:
    """One latent leaves nothing open: both terms in closed form, prefix by prefix."""
    toy = enumeration(("ab",))
    student, masses = RandomStudent(3, toy.num_units), toy.masses()
    logits = torch.stack([student(prefix) for prefix in toy.prefixes])
    for row, prefix in enumerate(toy.prefixes):
        cannot = sorted(set(range(toy.num_units)) - set(toy.can_follow(prefix)))
        logits[row, cannot] = NEVER
    log_p = logits.log_softmax(1)
    of_prefix = dict(zip(toy.prefixes, log_p.numpy(), strict=True))
    is_written = torch.tensor([prefix in masses for prefix in toy.prefixes])
    taken = log_p[torch.arange(len(log_p)), toy.batch.pairs.targets.units]
    probability = torch.zeros(len(toy.written)).double().index_add(0, toy.owner, taken).exp()
    assert float(probability.sum()) == pytest.approx(1)
    terms = toy.terms(logits, FORMS["reverse_kl"])
    nats = (terms.folded + terms.split) * probability[toy.owner] * is_written
    expected = 0.0
    for prefix, mass in masses.items():
        if prefix not in of_prefix:
            continue
        reached = np.exp(sum(of_prefix[prefix[:row]][unit] for row, unit in enumerate(prefix)))
        p = np.exp(of_prefix[prefix])
        folded, q = first_token_mass(toy.vocabulary, p), first_token_mass(toy.vocabulary, mass)
        q /= q.sum()
        allowed = q > 1e-12
        rest = folded[allowed].sum()
        inside = folded[allowed] / rest
        kl = (inside * np.log(inside / q[allowed].clip(1e-300))).sum() - np.log(rest)
        expected += reached * kl
        if p[4] > 1e-12 and mass[[0, 4]].sum() > 1e-12:  # `ab` is on offer wherever `a` follows
            share, t = p[4] / folded[0], mass[4] / mass[[0, 4]].sum()
            kl = share * np.log(share / t) + (1 - share) * np.log((1 - share) / (1 - t))
            expected += reached * folded[0] * kl
    assert float(nats.sum()) == pytest.approx(expected, rel=1e-3)


def descended(toy: Enumeration, target: OfferTarget, num_steps: int = 1500) -> float:
    """Return how far from Q a tabular student ends that learns from what it writes, in nats."""
    places = {prefix: index for index, prefix in enumerate(dict.fromkeys(toy.prefixes))}
    index = torch.tensor([places[prefix] for prefix in toy.prefixes])
    mask = torch.full((len(places), toy.num_units), NEVER, dtype=torch.float64)
    for prefix, place in places.items():
        mask[place, toy.can_follow(prefix)] = 0
    random = torch.Generator().manual_seed(1)
    table = torch.randn(mask.shape, dtype=torch.float64, generator=random).requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.05)
    units = toy.batch.pairs.targets.units
    for _ in range(num_steps):
        logits = (table + mask)[index]
        taken = logits.detach().log_softmax(1)[torch.arange(len(units)), units]
        weight = torch.zeros(len(toy.written)).double().index_add(0, toy.owner, taken).exp()
        # Adam is blind to scale: a floor lets prefixes that are hardly ever written learn as well.
        terms = toy.terms(logits, FORMS["reverse_kl"], target)
        optimizer.zero_grad()
        ((terms.folded + terms.split) * (weight[toy.owner] + 1e-6)).sum().backward()
        optimizer.step()
    log_p = (table.detach() + mask).log_softmax(1)
    nats = 0.0
    for text in strings():
        code = tuple(toy.vocabulary.encode(ids(text)))
        log_q = float(toy.teacher.log_probability(text))
        if log_q > -100:
            log_s = sum(float(log_p[places[code[:row]], unit]) for row, unit in enumerate(code))
            nats += np.exp(log_q) * (log_q - log_s)
    return nats


def test_student_that_descends_the_terms_becomes_the_encoded_teacher() -> None:
    """Also over-used and under-used latents, and explicit tokens where a latent is due."""
    toy = enumeration(("ab", "abc", "ca"))
    assert descended(toy, toy.target) < 0.01


def test_student_without_offers_does_not() -> None:
    toy = enumeration(("ab", "abc", "ca"))
    none = toy.target.rows[:0]
    without = OfferTarget(
        rows=none,
        latents=none,
        log_probabilities=none.double(),
        open_rows=toy.target.open_rows,
        open_tokens=toy.target.open_tokens,
    )
    assert descended(toy, without, num_steps=300) > 0.1


def test_code_that_encoding_would_not_write_stops_excluding_at_what_it_completes() -> None:
    vocabulary = vocabulary_of("ab", "abc")
    written, _ = pending_at_edges(vocabulary, ids("abcd"), ids("abcd"))
    assert [pending.banned for pending in written] == [set(), {1}, set(), set()]
    encoded, _ = pending_at_edges(vocabulary, ids("abd"), [4, 3])
    assert [pending.banned for pending in encoded] == [set(), {2}]
    broken, _ = pending_at_edges(vocabulary, ids("abcd"), [4, 2, 3])
    assert [pending.banned for pending in broken] == [set(), {2}, set()]


def test_latent_beyond_the_end_of_an_unfinished_text_is_on_offer_up_to_its_last_token() -> None:
    vocabulary = vocabulary_of("ab", "abca")
    prompt = Prompt(teacher_ids=np.asarray(ids("dc")), student_ids=np.asarray(ids("dc")))
    batch = collate_samples(vocabulary, [pair_sample(vocabulary, prompt, ids("abc"))])
    assert batch.offer_latents.tolist() == [0, 1]
    assert batch.path_rows[batch.offer_ends].tolist() == [2, 4]
    assert batch.last_tokens.tolist() == ids("ba")


def two_turns() -> Trajectory:
    text = "dabcdcabdaba"
    roles = [("user", 0, 1), ("assistant", 1, 5), ("user", 5, 7), ("assistant", 7, 12)]
    return Trajectory(
        trajectory_id="turns",
        task_id="turns",
        token_ids=np.asarray(ids(text), dtype=np.int32),
        spans=tuple(Span(role=role, start=start, end=end) for role, start, end in roles),
        entropies=np.zeros(len(text), dtype=np.float32),
        entropy_kind="exact",
        temperature=1.0,
        is_finished=False,
    )


def test_prompts_are_what_stands_before_an_action_and_chance_picks_the_turn() -> None:
    vocabulary = vocabulary_of("ab", "ca")
    batch = collate([align(vocabulary, item) for item in (two_turns(), trajectory_of("abd"))])
    found = set()
    for seed in range(20):
        first, second = prompts_of(batch, np.random.default_rng(seed))
        assert second.teacher_ids.tolist() == second.student_ids.tolist() == ids("d")
        assert vocabulary.expand(first.student_ids) == first.teacher_ids.tolist()
        found.add(tuple(first.student_ids.tolist()))
    assert found == {(3,), (3, 4, 2, 3, 5)}


def stage_of(vocabulary: LatentVocabulary, **options: Any) -> OnPolicyStage:
    return OnPolicyStage(OnPolicySettings(share=1.0, start_after=0.0, **options), vocabulary)


def module_with_stage(name: str, vocabulary: LatentVocabulary, **options: Any) -> Any:
    trainable = options.pop("trainable", "lora")
    student = student_of(name, vocabulary, trainable=trainable)
    student.model.generation_config.eos_token_id = ALPHABET.index(END)
    module = module_of(student, on_policy=OnPolicySettings(share=1.0, start_after=0.0, **options))
    module.on_policy_stage = OnPolicyStage(module.on_policy, vocabulary)
    module.__dict__["_trainer"] = None
    return module


def sampled_by(module: Any, vocabulary: LatentVocabulary, place: tuple[int, ...]) -> OnPolicyBatch:
    found = module.on_policy_stage.sample(module.student, batch_of(vocabulary), place)
    assert found is not None
    return found[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_student_without_latents_that_is_its_teacher_learns_nothing(
    name: str, trainable: str
) -> None:
    module = module_with_stage(name, EMPTY, trainable=trainable, max_tokens=10)
    loss, terms = module.compare_samples(sampled_by(module, EMPTY, (0,)))
    assert abs(float(loss.detach())) < 1e-6
    assert terms.agrees.all()


@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
def test_learning_from_samples_lowers_their_divergence(trainable: str) -> None:
    module = module_with_stage("llama-untied", VOCABULARY, trainable=trainable, max_tokens=8)
    steps = Steps(module)

    def measured() -> float:
        with torch.no_grad():
            losses = [
                module.compare_samples(sampled_by(module, VOCABULARY, (1, place)))[0]
                for place in range(20)
            ]
        return float(torch.stack(losses).mean())

    before = measured()
    for step in range(25):
        steps.optimizer.zero_grad()
        loss, _ = module.compare_samples(sampled_by(module, VOCABULARY, (0, step)))
        loss.backward()
        steps.optimizer.step()
    assert measured() < 0.8 * before


def test_sample_is_the_same_for_the_same_place_and_another_for_another() -> None:
    module = module_with_stage("qwen3-tied", VOCABULARY, max_tokens=8)
    batches = [sampled_by(module, VOCABULARY, place) for place in ((3, 1), (3, 1), (3, 2), (4, 1))]
    written = [batch.pairs.student_ids.tolist() for batch in batches]
    assert written[0] == written[1]
    assert written[0] != written[2]
    assert written[0] != written[3]


def test_immediate_end_of_all_turns_is_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_with_stage("llama-tied", VOCABULARY, max_tokens=8)
    end = Sample(units=[ALPHABET.index(END)], is_finished=True)
    monkeypatch.setattr(
        "lar_lightning.training.on_policy.sample_units",
        lambda student, prompts, *_, **__: [end] * 4,
    )
    batch = sampled_by(module, VOCABULARY, (0,))
    loss, _ = module.compare_samples(batch)
    loss.backward()
    assert len(batch.offer_rows) == 0
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_step_without_room_for_an_action_takes_the_batch_itself() -> None:
    module = module_with_stage("llama-tied", VOCABULARY, max_tokens=64)  # the model reads 64
    logged: dict[str, float] = {}
    module.num_steps = 10
    module.log = lambda name, value, **_: logged.__setitem__(name, value)
    module.log_dict = lambda values, **_: logged.update(values)
    batch = batch_of(VOCABULARY)
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, module.compare(batch)[0])
    assert logged["train/on_policy_skipped"] == 1
    assert logged["train/on_policy"] == 0
    module.on_policy_stage.settings = OnPolicySettings(share=1.0, start_after=0.0, max_tokens=8)
    module.training_step(batch, 0)
    assert logged["train/on_policy_skipped"] == 0
    assert logged["train/on_policy"] == 1
    assert logged["train/on_policy_num_units"] <= logged["train/on_policy_num_tokens"]


def test_share_and_start_decide_which_steps_sample() -> None:
    stage = OnPolicyStage(OnPolicySettings(share=0.3, start_after=0.25), VOCABULARY)
    due = [stage.is_due(step, 4000) for step in range(4000)]
    assert not any(due[:1000])
    assert 0.26 < np.mean(due[1000:]) < 0.34
    assert due == [stage.is_due(step, 4000) for step in range(4000)]
    assert not any(OnPolicyStage(OnPolicySettings(), VOCABULARY).is_due(s, 9) for s in range(9))
    always = stage_of(VOCABULARY)
    assert all(always.is_due(step, 9) for step in range(9))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("share", -0.1),
        ("share", 1.5),
        ("share", float("nan")),
        ("start_after", 1.0),
        ("beta", 0.0),
        ("temperature", -1.0),
        ("max_tokens", 0),
        ("seed", -1),
    ],
)
def test_settings_outside_their_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=rf"on_policy\.{name}"):
        OnPolicySettings(**{name: value})


def test_vllm_engine_is_refused_where_several_processes_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lar_lightning.policies.find_spec", lambda name: object())
    module = module_with_stage("llama-tied", VOCABULARY, engine="vllm")
    module.__dict__["_trainer"] = SimpleNamespace(world_size=4)
    with pytest.raises(SettingError, match=r"on_policy\.engine.*got vllm in 4"):
        module.on_fit_start()
    module.__dict__["_trainer"] = SimpleNamespace(world_size=1)
    module.on_fit_start()


def test_vllm_that_is_not_installed_is_missed_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lar_lightning.policies.find_spec", lambda name: None)
    module = module_with_stage("llama-tied", VOCABULARY, engine="vllm")
    module.__dict__["_trainer"] = SimpleNamespace(world_size=1)
    with pytest.raises(SettingError, match="needs vLLM"):
        module.on_fit_start()
    module.on_policy = OnPolicySettings(share=0.0, engine="vllm")
    module.on_fit_start()


def test_temperature_that_vllm_refuses_is_refused_with_the_settings() -> None:
    OnPolicySettings(temperature=2.5)
    with pytest.raises(SettingError, match=r"on_policy\.temperature.*got 2\.5"):
        OnPolicySettings(temperature=2.5, engine="vllm")
