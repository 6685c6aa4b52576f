"""What a student and its teacher make of the same batch, compared.

Dimensions: P positions of the teacher and Q of the student, of all trajectories; H hidden size.
"""

from jaxtyping import Float
from torch import Tensor

from lar_lightning.batches import DistillationBatch
from lar_lightning.losses.distillation import RowTerms, distillation_loss
from lar_lightning.losses.residues import residues
from lar_lightning.losses.splits import expected_units
from lar_lightning.models.student import Student
from lar_lightning.settings import DistillationSettings
from lar_lightning.training.on_policy import OnPolicyBatch

HiddenStates = tuple[Float[Tensor, "P H"], Float[Tensor, "Q H"]]
"""The teacher's and the student's, at all of their positions."""


def compare(
    hidden: HiddenStates,
    batch: DistillationBatch,
    student: Student,
    settings: DistillationSettings,
    *,
    rows_per_chunk: int,
) -> tuple[Tensor, RowTerms]:
    """Return the mean loss in nats of rows that the teacher wrote, and its terms.

    Args:
        hidden: Of `batch`.
        batch: The teacher's trajectories, paired row by row.
        student: Its matrices, and the base model's, project the rows.
        settings: Form of the loss.
        rows_per_chunk: Rows projected to the vocabulary at a time.
    """
    teacher, read = hidden
    heads, target = student.heads, None
    if settings.split != "nll":
        target = expected_units(
            teacher[batch.decisions.teacher_rows],
            heads.teacher,
            batch.decisions,
            batch.targets,
            rows_per_chunk=rows_per_chunk,
        )
    rows, taken = read[batch.student_rows], None
    if settings.pending == "residual":
        taken = residues(rows, heads, batch.targets, batch.pendings, rows_per_chunk=rows_per_chunk)
    return distillation_loss(
        teacher[batch.teacher_rows],
        rows,
        heads,
        batch.targets,
        student.folding,
        settings=settings,
        split_target=target,
        residues=taken,
        rows_per_chunk=rows_per_chunk,
    )


def compare_samples(
    hidden: HiddenStates,
    batch: OnPolicyBatch,
    student: Student,
    settings: DistillationSettings,
    *,
    rows_per_chunk: int,
) -> tuple[Tensor, RowTerms]:
    """Return the mean loss in nats of rows that the student wrote, and its terms; see `compare`."""
    teacher, read = hidden
    return distillation_loss(
        teacher[batch.pairs.teacher_rows],
        read[batch.pairs.student_rows],
        student.heads,
        batch.pairs.targets,
        student.folding,
        settings=settings,
        split_target=batch.target(teacher, student.heads.teacher, rows_per_chunk),
        rows_per_chunk=rows_per_chunk,
    )
