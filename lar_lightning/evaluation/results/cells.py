"""One run of one method on the test tasks of one benchmark: what results are made from."""

from dataclasses import dataclass
from functools import cached_property

from lar_lightning.agents.episode import Episode

CellKey = tuple[str, str, str, str]
"""Backbone, benchmark, method, and what the method got ready on where that is another benchmark."""


@dataclass(frozen=True, kw_only=True)
class CellRun:
    """One run of a cell; a cell has runs of several seeds and repetitions."""

    backbone: str
    benchmark: str
    """As the user wrote it, with its options."""
    method: str
    learned_on: str = ""
    """Benchmark on whose training tasks the method got ready; empty: the one that is played."""
    seed: int
    run: int
    """Repetition with the same seed; repetitions differ in batching only."""
    episodes: tuple[Episode, ...]
    wall_clock_seconds: float
    reparameterization_rate: float | None = None
    """Share of the played action tokens inside latents, where the method has latents."""
    mined_rate: float | None = None
    """The same of the trajectories that it learned from, all latents used: the strength of
    abstraction (paper 5.3). Latents that no other task needs raise this rate and not the other."""

    @property
    def key(self) -> CellKey:
        """What its cell is called."""
        learned_on = "" if self.learned_on == self.benchmark else self.learned_on
        return self.backbone, self.benchmark, self.method, learned_on

    @cached_property
    def by_task(self) -> dict[str, Episode]:
        """Episodes by their task."""
        return {episode.task_id: episode for episode in self.episodes}
