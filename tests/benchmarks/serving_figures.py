"""Ratios of serving speeds, round by round, beside what fewer units alone would give."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tests.benchmarks.serving_load import Load

Figures = dict[str, float]


def figures_of(load: Load) -> Figures:
    """Return the figures of one run.

    first_ms: median time to the first unit.
    token_ms: time behind the first unit for each expanded token behind the first.
    episode_s: mean time of an answer.
    tokens_per_s: expanded tokens of all answers for each second of wall clock.
    """
    answers = load.answers
    behind = sum(max(answer.num_expanded - 1, 0) for answer in answers)
    return {
        "first_ms": 1e3 * median(answer.first_seconds for answer in answers),
        "token_ms": 1e3
        * sum(answer.seconds - answer.first_seconds for answer in answers)
        / max(behind, 1),
        "episode_s": sum(answer.seconds for answer in answers) / len(answers),
        "tokens_per_s": sum(answer.num_expanded for answer in answers) / load.wall_seconds,
    }


def ideals_of(other: Load, vanilla: Load) -> Figures:
    """Return the ratio of each figure that fewer units alone would give, all else being free.

    Of the first unit that is the ratio of the prompts' units, of an answer that of its units, and
    of an expanded token that of the units for each of them.
    """

    def prompt(load: Load) -> int:
        return sum(answer.num_prompt_units for answer in load.answers)

    def units(load: Load) -> int:
        return sum(len(answer.units) for answer in load.answers)

    def expanded(load: Load) -> int:
        return sum(answer.num_expanded for answer in load.answers)

    num_units = units(other) / units(vanilla)
    a_token = num_units * expanded(vanilla) / expanded(other)
    return {
        "first_ms": prompt(other) / prompt(vanilla),
        "token_ms": a_token,
        "episode_s": num_units,
        "tokens_per_s": 1 / a_token,
    }


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One figure of one contender over that of another, measured in the same rounds."""

    middle: float
    least: float
    most: float
    ideal: float

    @property
    def against_ideal(self) -> float:
        """1 is ideal; above it a time is longer, and a throughput higher."""
        return self.middle / self.ideal

    def as_json(self) -> dict[str, float]:
        """Return rounded numbers."""
        content = {
            "median": self.middle,
            "min": self.least,
            "max": self.most,
            "ideal": self.ideal,
            "against_ideal": self.against_ideal,
        }
        return {name: round(value, 4) for name, value in content.items()}

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.least:.3f} to {self.most:.3f}), ideal {self.ideal:.3f}"


def ratios(others: Sequence[Load], vanillas: Sequence[Load]) -> dict[str, Ratio]:
    """Return the ratio of each figure over rounds; the two of a round were run side by side."""
    pairs = list(zip(others, vanillas, strict=True))
    quotients = []
    for other, vanilla in pairs:
        ours, theirs = figures_of(other), figures_of(vanilla)
        quotients.append({name: ours[name] / theirs[name] for name in ours})
    ideals = [ideals_of(*pair) for pair in pairs]
    return {
        name: Ratio(
            middle=median(quotient[name] for quotient in quotients),
            least=min(quotient[name] for quotient in quotients),
            most=max(quotient[name] for quotient in quotients),
            ideal=median(ideal[name] for ideal in ideals),
        )
        for name in quotients[0]
    }


def middle_figures(loads: Sequence[Load]) -> Figures:
    """Return the median of each figure over rounds."""
    rounds = [figures_of(load) for load in loads]
    return {name: median(figures[name] for figures in rounds) for name in rounds[0]}
