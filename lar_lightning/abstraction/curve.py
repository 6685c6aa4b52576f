"""What stages came to, and which of them holds."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from lar_lightning.abstraction.held_out import HeldOut
from lar_lightning.artefacts import write_text


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A point of the curve."""

    stage: int
    step: int
    num_latents: int
    rate: float
    """Share of held-out action tokens inside latents."""
    saving: float
    """Share of held-out action tokens that fall away."""
    nats_per_token: float
    """Held-out divergence over expanded tokens: comparable between vocabularies, where that of a
    row is not, since rows get fewer."""
    nats_per_row: float
    folded_nats_per_token: float
    row_agreement: float
    score: float | None
    """Of the probe, where there was one."""
    holds: bool
    reason: str
    """Why it does not hold."""

    def __str__(self) -> str:
        """Say it in a line."""
        verdict = "holds" if self.holds else f"does not hold, {self.reason}"
        return (
            f"stage {self.stage}, {self.num_latents} latents, rate {self.rate:.3f}, saving "
            f"{self.saving:.3f}, {self.nats_per_token:.4f} nats a token: {verdict}"
        )

    @classmethod
    def of(cls, held_out: HeldOut, **rest: Any) -> Self:
        """Make shares of sums."""
        return cls(
            rate=held_out.covered / held_out.tokens,
            saving=1 - held_out.units / held_out.tokens,
            nats_per_token=held_out.nats / held_out.tokens,
            nats_per_row=held_out.nats / held_out.units,
            folded_nats_per_token=held_out.folded_nats / held_out.tokens,
            row_agreement=held_out.agreeing / held_out.units,
            **rest,
        )


def verdict(
    nats_per_token: float, limit: float, num_alarms: int, score: float | None, least: float | None
) -> str:
    """Return why a stage does not hold, or nothing."""
    if num_alarms:
        return f"{num_alarms} alarms of collapse"
    if not nats_per_token <= limit:
        return f"{nats_per_token:.4g} nats a token are above {limit:g}"
    if least is not None and score is not None and score < least:
        return f"the score {score:.4g} is below {least:g}"
    return ""


def write_curve(path: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Write all stages so far as CSV, whole or not at all."""
    text = io.StringIO()
    names = [field.name for field in fields(StageResult)]
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    for result in results:
        table.writerow({name: _cell(result[name]) for name in names})
    write_text(path, text.getvalue())


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return f"{value:.6g}" if isinstance(value, float) else value
