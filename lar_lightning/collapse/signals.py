"""Which metrics are watched for collapse, and what is bad in each.

Two kinds. A *change* is held against the best window of its own past: training makes values better,
so the reference only ever moves to the better, and a slow decline counts as well as a sudden one.
A *limit* is bad in itself, so that a run that was broken from its first step is found too:

    collapse/nats       divergence of a row: a student two nats from its teacher never was one
    collapse/choice     nats of the split term over those of choosing by chance among the units that
                        begin alike, log(1 + their number): latents taken too seldom or too often
    collapse/misplaced_rows  how far the same of untrained rows is from 1, where all start at chance
    collapse/idle_rows  1 where latent rows got no gradient at all
    collapse/loss_against_start  held-out loss over that before the first step

Chance is where training begins, since a latent's output row starts as that of its first token. But
with a high learning rate a student first learns how seldom its latents are due, and overdoes it: on
SmolLM2 it takes up to four times the nats of chance until step 12. So this limit is read behind the
warm-up, and must be passed for long. Nats where a latent is due, and where none is, are logged
apart, but no limit holds for one of them alone: a student that knows how seldom a latent is due
takes more than chance where it is.
"""

from dataclasses import dataclass
from typing import Literal

from lar_lightning.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class Signal:
    """A metric to watch."""

    name: str
    """As it is logged."""
    bad: Literal["up", "down"] = "up"
    """The direction of collapse."""
    when: Literal["step", "validation"] = "step"
    """When it is read."""
    limit: float | None = None
    """A value that is bad in itself; None holds the metric against its own best."""
    window: int = 20
    """Values that the reference is a mean of."""
    min_spread: float = 0.1
    """Least spread of the reference, as a share of it: less is no change."""
    floor: float = 0.02
    """Least spread in the metric's own unit: a loss of next to nothing may well double."""
    patience: int = 3
    """Fewest values that an alarm needs."""
    has_warmup: bool = True
    """Not read while training warms up."""
    skips_repeats: bool = False
    """The same number again is no new value: for metrics that are not made at each step."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.patience < 1:
            raise SettingError(
                f"`window` and `patience` of the signal {self.name!r} must be at least 1, got "
                f"{self.window} and {self.patience}."
            )
        if not self.min_spread >= 0 or not self.floor > 0:
            raise SettingError(
                f"`min_spread` of the signal {self.name!r} must be at least 0 and its `floor` "
                f"above 0, got {self.min_spread} and {self.floor}."
            )


DEFAULT_SIGNALS = (
    Signal(name="train/loss_nats", min_spread=0.2),
    Signal(name="collapse/nats", limit=1.5, patience=5),
    Signal(name="collapse/row_gradient_norm", min_spread=1.0, patience=5),
    Signal(name="collapse/idle_rows", limit=0.5, patience=5),
    Signal(name="collapse/misplaced_rows", limit=0.0, floor=0.005, patience=1, has_warmup=False),
    Signal(name="collapse/choice", limit=1.0, patience=20),
    Signal(name="val/loss_nats", when="validation", window=2, patience=1),
    Signal(name="val/folded_nats", when="validation", window=2, patience=1),
    Signal(
        name="val/row_agreement",
        bad="down",
        when="validation",
        window=2,
        min_spread=0.05,
        patience=1,
    ),
    Signal(
        name="val/expected_adoption",
        bad="down",
        when="validation",
        window=2,
        min_spread=0.05,
        patience=1,
    ),
    Signal(name="collapse/loss_against_start", when="validation", limit=1.0, patience=1),
    Signal(name="collapse/val_nats", when="validation", limit=1.5, patience=1),
    Signal(name="collapse/val_choice", when="validation", limit=1.0, patience=1),
    # Of short texts, which are few: only what is plain.
    Signal(name="gen/repetition", limit=0.5, patience=2, skips_repeats=True),
    Signal(name="gen/excess_share", limit=0.25, patience=2, skips_repeats=True),
    Signal(
        name="gen/agreement", bad="down", window=2, min_spread=0.25, patience=2, skips_repeats=True
    ),
    Signal(
        name="gen/tokens_per_text",
        bad="down",
        window=2,
        min_spread=0.25,
        patience=2,
        skips_repeats=True,
    ),
    Signal(
        name="gen/usage_perplexity",
        bad="down",
        window=2,
        min_spread=0.25,
        patience=2,
        skips_repeats=True,
    ),
    Signal(
        name="gen/success_rate",
        bad="down",
        window=2,
        min_spread=0.25,
        floor=0.1,
        patience=2,
        skips_repeats=True,
    ),
)
