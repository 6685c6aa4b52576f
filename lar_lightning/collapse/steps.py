"""Signals of one training step, in one process."""

from typing import TYPE_CHECKING

from lar_lightning.collapse.usage import ChoicePool, use_of, use_sums

if TYPE_CHECKING:
    from lar_lightning.batches import DistillationBatch
    from lar_lightning.module import LatentActionModule


def step_signals(
    module: "LatentActionModule",
    batch: "DistillationBatch",
    row_gradient_norm: float | None,
    pool: ChoicePool,
) -> dict[str, float]:
    """Return what is known behind a step, by name.

    Args:
        module: Whose last terms are of this batch, or None.
        batch: Of the step.
        row_gradient_norm: None where gradients are still being accumulated.
        pool: Choices of the steps before that were too few for a ratio; takes in those of this one.
    """
    values: dict[str, float] = {}
    if module.student.num_active and row_gradient_norm is not None:
        values["collapse/row_gradient_norm"] = row_gradient_norm
        values["collapse/idle_rows"] = float(row_gradient_norm == 0)
    terms, settings = module.last_terms, module.distillation
    if terms is None:
        return values
    sums = use_sums(batch.targets, terms.split, module.student.folding)
    use = vars(use_of(sums)) | {"choice": pool.take_in(sums)}
    values |= {f"collapse/{name}": value for name, value in use.items() if value is not None}
    # Other forms of the loss are no divergence, or count it in another unit.
    is_exact = (settings.objective, settings.divergence) == ("exact", "forward_kl")
    if is_exact and settings.temperature == 1:
        values["collapse/nats"] = float((terms.folded + terms.split).mean())
    return values
