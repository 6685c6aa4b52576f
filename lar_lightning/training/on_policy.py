"""The on-policy stage: the student writes, the teacher scores the text (GKD; algorithm 4).

At each step of the stage, with probability lambda, the actions of the batch are replaced by what
the student writes after the same prompts. Its units are kept as it wrote them, also where they are
not the leftmost-longest code of their text: that is where it really goes. Each unit edge is an edge
of base tokens, so all rows have their pair: the student's after s_1..s_j, and the teacher's after
the expansion of s_1..s_j.

*What is minimized.* Let Q be the teacher's distribution over latent trajectories, that of
encode(x) for its texts x. With s drawn from the student, and no gradient through the draw,

    E_s [ sum over rows ( D(Q, student: first token of the next unit)
                          + sum over offers D(Q, student: taken or not, given that token) ) ]

where D is the reverse KL, or another of `divergences`, and an offer is a latent that the text
after the row could have been abbreviated by (see `offers`). Every term is at least 0, and all are
0 where the student is Q. This is not the reverse KL of whole trajectories, which is infinite from
the first unit on that encoding would never write.

Of the terms, Q is known from one teacher pass over the text, save one thing. Rests of pending
latents (see `alignment`) are excluded as they are off-policy, and where a rest of several tokens is
pending, the probabilities of those tokens that begin one are open. The row then compares both
models given that none of these tokens follows, which needs no counterfactual; off-policy a token
of the teacher's stands in, but a token of the student's would teach it nothing.

Q says nothing of rows behind a unit that encoding would not have written. There each unit goes on
to exclude what it excludes in Q, until the text itself completes a latent that the unit should
have been; from then on it excludes nothing.

Nothing of the stage is kept from step to step: what is drawn depends on seed, step and batch alone.

Dimensions: B trajectories, T teacher positions, R rows in the loss, N path rows, O offers, W open
tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lar_lightning.alignment import COLUMNS, AlignedTrajectory, pending_at_edges
from lar_lightning.batches import DistillationBatch, Movable, collate
from lar_lightning.losses.offers import Offer, OfferTarget, find_offers, rest_log_probabilities
from lar_lightning.models.student import Student
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import OnPolicySettings
from lar_lightning.training.sampling import Sample, sample_units
from lar_lightning.training.vllm_sampling import VllmSampler


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """All that stands before an action, in both currencies."""

    teacher_ids: np.ndarray
    student_ids: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SampleCounts:
    """What a step has sampled."""

    num_units: int
    num_tokens: int
    """That the units expand to."""
    num_latents: int
    num_excess_units: int
    """Beyond the leftmost-longest code of the same text."""
    truncated_share: float
    """Share of the actions that the token limit cut."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OnPolicyBatch(Movable):
    """Trajectories that the student wrote, paired row by row, with their offers."""

    pairs: DistillationBatch
    path_rows: Int[Tensor, " N"]
    """Index into the flattened (B T) positions: the rows that predict the rests of offers."""
    path_tokens: Int[Tensor, " N"]
    """The token behind each of them."""
    offer_rows: Int[Tensor, " O"]
    """Index into the rows of the loss, ascending."""
    offer_latents: Int[Tensor, " O"]
    offer_starts: Int[Tensor, " O"]
    """Index into the path rows."""
    offer_ends: Int[Tensor, " O"]
    last_tokens: Int[Tensor, " O"]
    open_rows: Int[Tensor, " W"]
    open_tokens: Int[Tensor, " W"]

    def target(
        self, teacher_hidden: Tensor, teacher_head: Tensor, rows_per_chunk: int
    ) -> OfferTarget:
        """Return what the teacher says, given its hidden states at all (B T) positions."""
        log_probabilities = rest_log_probabilities(
            teacher_hidden[self.path_rows],
            teacher_head,
            self.path_tokens,
            self.offer_starts,
            self.offer_ends,
            self.last_tokens,
            rows_per_chunk=rows_per_chunk,
        )
        return OfferTarget(
            rows=self.offer_rows,
            latents=self.offer_latents,
            log_probabilities=log_probabilities,
            open_rows=self.open_rows,
            open_tokens=self.open_tokens,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PairedSample:
    """One trajectory that the student wrote; `offers` and open tokens count its rows."""

    aligned: AlignedTrajectory
    num_prompt_tokens: int
    offers: list[Offer]
    open_rows: list[int]
    open_tokens: list[int]


def prompts_of(batch: DistillationBatch, random: np.random.Generator) -> list[Prompt]:
    """Return what stands before one action of each trajectory; of several, chance picks one."""
    teacher_ids, student_ids = batch.teacher_ids.cpu().numpy(), batch.student_ids.cpu().numpy()
    teacher_rows, student_rows = batch.teacher_rows.cpu().numpy(), batch.student_rows.cpu().numpy()
    # Rows of one action are neighbours; nothing in the last position is ever a row.
    (begins,) = np.nonzero(np.diff(student_rows, prepend=-2) != 1)
    owners = student_rows[begins] // student_ids.shape[1]
    prompts = []
    for owner in np.unique(owners).tolist():
        row = random.choice(begins[owners == owner])
        teacher_end = teacher_rows[row] % teacher_ids.shape[1] + 1
        student_end = student_rows[row] % student_ids.shape[1] + 1
        prompts.append(
            Prompt(
                teacher_ids=teacher_ids[owner, :teacher_end],
                student_ids=student_ids[owner, :student_end],
            )
        )
    return prompts


def pair_sample(vocabulary: LatentVocabulary, prompt: Prompt, units: Sequence[int]) -> PairedSample:
    """Pair the rows of what the student wrote after a prompt, unit by unit."""
    tokens = vocabulary.expand(units)
    edges = np.cumsum([0, *vocabulary.lengths(units)])[:-1]
    pendings, _ = pending_at_edges(vocabulary, tokens, units)
    num_rows = len(units)
    columns: dict[str, Any] = {name: [] for name in COLUMNS}
    columns["teacher_rows"] = len(prompt.teacher_ids) - 1 + edges
    columns["student_rows"] = len(prompt.student_ids) - 1 + np.arange(num_rows)
    columns["target_tokens"] = np.asarray(tokens)[edges]
    columns["target_units"] = units
    columns["is_sampled"] = np.zeros(num_rows, dtype=bool)
    columns["num_since_latent"] = np.full(num_rows, -1)  # all rows weigh the same
    for row, pending in enumerate(pendings):
        columns["banned_rows"] += [row] * len(pending.banned)
        columns["banned_tokens"] += sorted(pending.banned)
    arrays = {
        name: np.asarray(values, dtype=bool if name == "is_sampled" else np.int64)
        for name, values in columns.items()
    }
    return PairedSample(
        aligned=AlignedTrajectory(
            trajectory_id="",
            teacher_ids=np.concatenate([prompt.teacher_ids, tokens]).astype(np.int64),
            student_ids=np.concatenate([prompt.student_ids, units]).astype(np.int64),
            **arrays,
        ),
        num_prompt_tokens=len(prompt.teacher_ids),
        offers=find_offers(vocabulary, tokens, edges.tolist(), pendings),
        open_rows=[row for row, pending in enumerate(pendings) for _ in pending.deep],
        open_tokens=[token for pending in pendings for token in sorted(pending.deep)],
    )


def collate_samples(vocabulary: LatentVocabulary, samples: Sequence[PairedSample]) -> OnPolicyBatch:
    """Pad and flatten paired samples."""
    pairs = collate([sample.aligned for sample in samples])
    width = pairs.teacher_ids.shape[1]
    columns: dict[str, list[int]] = {
        name: [] for name in ("rows", "latents", "starts", "ends", "open_rows", "open_tokens")
    }
    path_rows: set[int] = set()
    num_rows = 0
    for index, sample in enumerate(samples):
        # The row that predicts a token of the action stands one position before it.
        before = index * width + sample.num_prompt_tokens - 1
        for offer in sample.offers:
            columns["rows"].append(num_rows + offer.unit)
            columns["latents"].append(offer.latent)
            columns["starts"].append(before + offer.start)
            columns["ends"].append(before + offer.end)
            path_rows.update(range(before + offer.start, before + offer.end + 1))
        columns["open_rows"] += [num_rows + row for row in sample.open_rows]
        columns["open_tokens"] += sample.open_tokens
        num_rows += len(sample.aligned.target_units)
    tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in columns.items()}
    paths = torch.tensor(sorted(path_rows), dtype=torch.int64)
    # Behind a text's end there is no token; the row is the last of its path, where none is asked.
    following = torch.cat([pairs.teacher_ids.flatten()[1:], torch.zeros(1, dtype=torch.int64)])
    segments = vocabulary.segments
    return OnPolicyBatch(
        pairs=pairs,
        path_rows=paths,
        path_tokens=following[paths],
        offer_rows=tensors["rows"],
        offer_latents=tensors["latents"],
        offer_starts=torch.searchsorted(paths, tensors["starts"]),
        offer_ends=torch.searchsorted(paths, tensors["ends"]),
        last_tokens=torch.tensor([segments[z][-1] for z in columns["latents"]], dtype=torch.int64),
        open_rows=tensors["open_rows"],
        open_tokens=tensors["open_tokens"],
    )


class OnPolicyStage:
    """Decides which steps sample, and samples."""

    def __init__(
        self,
        settings: OnPolicySettings,
        vocabulary: LatentVocabulary,
        vllm: VllmSampler | None = None,
    ) -> None:
        """Set up the stage for one vocabulary; without `vllm` the student itself decodes."""
        self.settings = settings
        self.vocabulary = vocabulary
        self.vllm = vllm

    def is_due(self, step: int, num_steps: int) -> bool:
        """Tell whether a step of `num_steps` learns from samples; alike in all processes."""
        settings = self.settings
        if settings.share == 0 or step < round(settings.start_after * num_steps):
            return False
        return np.random.default_rng([settings.seed, step]).random() < settings.share

    def sample(
        self, student: Student, batch: DistillationBatch, place: Sequence[int]
    ) -> tuple[OnPolicyBatch, SampleCounts] | None:
        """Let the student write one action in each trajectory of a batch.

        Args:
            student: As it is being trained.
            batch: Whose prompts are used.
            place: Numbers that no other batch of the run has, such as step and process.

        Returns:
            None where no prompt leaves room for an action.
        """
        random = np.random.default_rng([self.settings.seed, 1, *place])
        limit = student.max_length if self.vllm is None else self.vllm.max_length(student)
        room = self.settings.max_tokens + self.vocabulary.longest
        prompts = [
            prompt
            for prompt in prompts_of(batch, random)
            if len(prompt.teacher_ids) + room <= limit
        ]
        if not prompts:
            return None
        sample = sample_units if self.vllm is None else self.vllm.sample
        samples = sample(
            student,
            [prompt.student_ids.tolist() for prompt in prompts],
            torch.Generator().manual_seed(int(random.integers(2**62))),
            stop_units=student.stop_units,
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
        )
        paired = [
            pair_sample(self.vocabulary, prompt, sample.units)
            for prompt, sample in zip(prompts, samples, strict=True)
        ]
        sampled = collate_samples(self.vocabulary, paired).to(batch.teacher_ids.device)
        return sampled, self._counts(samples)

    def close(self) -> None:
        """Free the engine, if there is one."""
        if self.vllm is not None:
            self.vllm.close()

    def _counts(self, samples: Sequence[Sample]) -> SampleCounts:
        texts = [self.vocabulary.expand(sample.units) for sample in samples]
        num_units = sum(len(sample.units) for sample in samples)
        return SampleCounts(
            num_units=num_units,
            num_tokens=sum(map(len, texts)),
            num_latents=sum(
                self.vocabulary.is_latent(unit) for sample in samples for unit in sample.units
            ),
            num_excess_units=num_units - sum(len(self.vocabulary.encode(text)) for text in texts),
            truncated_share=1 - sum(sample.is_finished for sample in samples) / len(samples),
        )
