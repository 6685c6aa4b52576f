"""The optional stage before distillation that gives new rows a meaning, with all else frozen.

A latent should leave the state that its segment would have left: the student's hidden states after
a latent are drawn to the teacher's at the paired rows, which trains input rows; cross-entropy of
the units trains output rows, and reaches nothing else. Each kind of row has a term of its own, so
there is no weight between them.

Dimensions: R rows, D hidden units.
"""

from jaxtyping import Float
from torch import Tensor

from lar_lightning.batches import RowTargets
from lar_lightning.losses.distillation import Heads, distillation_loss
from lar_lightning.losses.folding import Folding, RowTerms
from lar_lightning.settings import DistillationSettings

UNITS = DistillationSettings(objective="cross_entropy")


def grounding_loss(
    teacher_hidden: Float[Tensor, "R D"],
    student_hidden: Float[Tensor, "R D"],
    heads: Heads,
    targets: RowTargets,
    folding: Folding,
    *,
    rows_per_chunk: int = 64,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], RowTerms]:
    """Return the error of hidden states, the cross-entropy of units in nats, and its terms.

    The error is the mean square over positions after a latent, as a share of the teacher's.
    """
    is_after = targets.num_since_latent >= 0
    teacher, student = (hidden[is_after].float() for hidden in (teacher_hidden, student_hidden))
    # A batch without latents adds nothing, but has a gradient.
    error = (student - teacher).square().sum() / teacher.square().sum().clamp_min(1e-12)
    frozen = Heads(teacher=heads.teacher, base=heads.base.detach(), latent=heads.latent)
    nats, terms = distillation_loss(
        teacher_hidden,
        student_hidden.detach(),
        frozen,
        targets,
        folding,
        settings=UNITS,
        rows_per_chunk=rows_per_chunk,
    )
    return error, nats, terms
