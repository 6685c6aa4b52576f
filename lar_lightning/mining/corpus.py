"""All action tokens of many trajectories as flat arrays.

Dimensions: N action tokens of all trajectories.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from lar_lightning.trajectories import Trajectory


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Action spans end to end; no segment may reach over a start."""

    tokens: Int[np.ndarray, " N"]
    tasks: Int[np.ndarray, " N"]
    """Number of the task that a token belongs to: support counts these."""
    entropies: Float[np.ndarray, " N"]
    """Nats before each token was chosen."""
    starts: Bool[np.ndarray, " N"]
    """True where an action begins."""
    num_tasks: int

    def __len__(self) -> int:
        return len(self.tokens)


def corpus_of(trajectories: Sequence[Trajectory]) -> Corpus:
    """Collect the action tokens of trajectories, in their order."""
    task_ids = {
        task_id: index
        for index, task_id in enumerate(dict.fromkeys(t.task_id for t in trajectories))
    }
    spans = [(trajectory, span) for trajectory in trajectories for span in trajectory.action_spans]
    lengths = [span.end - span.start for _, span in spans]
    starts = np.zeros(sum(lengths), dtype=bool)
    starts[np.cumsum([0, *lengths])[:-1]] = True
    return Corpus(
        tokens=np.concatenate([t.token_ids[span.start : span.end] for t, span in spans]).astype(
            np.int64
        ),
        tasks=np.repeat([task_ids[t.task_id] for t, _ in spans], lengths),
        entropies=np.concatenate([t.entropies[span.start : span.end] for t, span in spans]),
        starts=starts,
        num_tasks=len(task_ids),
    )
