"""What an agent asks of an engine.

Continue prompts of token ids, and say how sure the model was.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a prompt."""

    max_tokens: int = 256
    """Most units to generate for one action."""
    with_entropies: bool = False
    """Also report the entropy of each next-token distribution, at temperature 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One prompt to be continued."""

    request_id: str
    prompt_ids: Sequence[int]
    temperature: float = 1.0
    """0 is greedy."""
    seed: int = 0
    """Of this request alone, so that neither order nor batching changes what is drawn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """What an engine wrote for a request; N is the number of its units."""

    request_id: str
    token_ids: list[int]
    """Units, with the turn-end token where one was generated."""
    is_finished: bool
    """False where `max_tokens` cut it."""
    entropies: Float[np.ndarray, " N"] | None = None
    """Nats, if asked for."""


class Policy(Protocol):
    """An engine with a model; a context manager that frees both."""

    entropy_kind: str
    """`exact`, or `upper bound from top-k`."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield each completion as soon as it is there, in any order."""
        ...


PolicyContext = AbstractContextManager[Policy]


def entropy_upper_bound(log_probabilities: Float[np.ndarray, " k"], vocabulary_size: int) -> float:
    """Bound the entropy of a distribution from above by its k largest log-probabilities.

    The missing mass m adds most where it is spread evenly over the V - k tokens that are not
    listed: -m log(m / (V - k)).
    """
    listed = np.exp(log_probabilities)
    missing = max(1.0 - float(listed.sum()), 0.0)
    bound = -float((listed * log_probabilities).sum())
    num_missing = vocabulary_size - len(log_probabilities)
    if missing > 0 and num_missing > 0:
        bound -= missing * float(np.log(missing / num_missing))
    return bound
