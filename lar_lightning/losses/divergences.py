"""Divergences between two next-token distributions given by their logits, row by row, in nats.

With teacher p, student q, banned tokens B that cannot follow (p is 0 there), and q' = q without B,
renormalized:

    forward_kl   KL(p || q)
    reverse_kl   KL(q' || p) - log q(not B)
    jsd          beta KL(p || m) + (1 - beta) KL(q' || m) - log q(not B)
                 with m = beta p + (1 - beta) q'

The forward KL splits into KL(p || q') - log q(not B) by itself; the other two would be infinite or
flat on B without it. `temperature` T tempers both distributions and multiplies by T^2, so that
gradients keep their scale.

Dimensions: R rows, V tokens, P banned tokens of all rows.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lar_lightning.settings import DistillationSettings

NEVER = -1e4
"""Logit of a banned token: its probability is exactly 0 in fp32, and 0 times it is 0 where 0 times
-inf is not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Banned:
    """Entries of the rows' distributions that cannot follow."""

    rows: Int[Tensor, " P"]
    tokens: Int[Tensor, " P"]

    def removed_from(self, logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """Return logits whose banned tokens have no probability."""
        if not len(self.rows):
            return logits
        return logits.index_put((self.rows, self.tokens), logits.new_tensor(NEVER))


def divergence(
    teacher_logits: Float[Tensor, "R V"],
    student_logits: Float[Tensor, "R V"],
    banned: Banned,
    settings: DistillationSettings,
    student_partition: Float[Tensor, " R"] | None = None,
) -> Float[Tensor, " R"]:
    """Return the divergence of each row; the teacher's logits get no gradient.

    `student_partition` is the logarithm of the student's partition function where it is known.
    """
    temperature = settings.temperature
    if temperature != 1:
        teacher_logits, student_logits = teacher_logits / temperature, student_logits / temperature
    if temperature != 1 or student_partition is None:
        student_partition = student_logits.logsumexp(1)
    teacher_logits = banned.removed_from(teacher_logits.detach())
    if settings.divergence == "forward_kl":
        nats = _forward_kl(teacher_logits, student_logits) + student_partition
    else:
        allowed = banned.removed_from(student_logits)
        remaining = allowed.logsumexp(1)
        p, q = teacher_logits.log_softmax(1), allowed - remaining[:, None]
        nats = _reverse_kl(p, q) if settings.divergence == "reverse_kl" else _jsd(p, q, settings)
        nats = nats + student_partition - remaining
    return temperature**2 * nats


def _forward_kl(teacher: Float[Tensor, "R V"], student: Float[Tensor, "R V"]) -> Tensor:
    """Return the forward KL less the student's log-partition."""
    with torch.no_grad():
        partition = teacher.logsumexp(1)
        probability = (teacher - partition[:, None]).exp_()
        negative_entropy = torch.linalg.vecdot(probability, teacher) - partition
    return negative_entropy - torch.linalg.vecdot(probability, student)


def _reverse_kl(p: Float[Tensor, "R V"], q: Float[Tensor, "R V"]) -> Tensor:
    return torch.linalg.vecdot(q.exp(), q - p)


def _jsd(
    p: Float[Tensor, "R V"], q: Float[Tensor, "R V"], settings: DistillationSettings
) -> Tensor:
    beta = settings.beta
    mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * torch.linalg.vecdot(p.exp(), p - mixture) + (1 - beta) * torch.linalg.vecdot(
        q.exp(), q - mixture
    )


def binary_divergence(
    target: Float[Tensor, " R"], log_probability: Float[Tensor, " R"], temperature: float
) -> Float[Tensor, " R"]:
    """Return tau KL(Bernoulli(target^(1/tau)) || Bernoulli(probability^(1/tau))) for each row.

    This is ALM's loss of a chunk of text, taken against not taken. The factor tau keeps its scale:
    for a target of 1 it is the negative log-likelihood at every tau.
    """
    p, q = target.log().clamp_min(NEVER) / temperature, log_probability / temperature
    taken = p.exp() * (p - q)
    not_taken = -torch.expm1(p) * (log_complement(p) - log_complement(q))
    return temperature * (taken + not_taken)


def log_complement(log_probability: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Return log(1 - p) of log p."""
    margin = 1e-6  # keeps the logarithm and its gradient finite at 1, as ALM's own code does
    return torch.log(-torch.expm1(log_probability - margin))
