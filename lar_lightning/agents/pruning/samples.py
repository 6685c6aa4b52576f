"""The training samples of TokenSkip: played episodes whose thoughts are pruned."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lar_lightning.agents.cot import CoT
from lar_lightning.agents.episode import Episode
from lar_lightning.agents.pruning.actions import PrunedAction, pruned_actions
from lar_lightning.agents.supervised.samples import Sample
from lar_lightning.agents.supervised.trainer import SupervisedSettings
from lar_lightning.agents.tokenskip import TokenSkip, with_ratio
from lar_lightning.agents.workshop import Workshop
from lar_lightning.artefacts import write_text
from lar_lightning.base_models import model_fingerprint
from lar_lightning.errors import NothingToLearn
from lar_lightning.tokenizer import Messages

LEAST_SAMPLES = 8
"""Fewest that are trained on: fewer would teach nothing."""
SAMPLES_FILE = "pruned.jsonl"
"""First line: what it was made from, and counts; then a sample a line."""
_DECIDE_NOTHING = {"ratio", *(field.name for field in fields(SupervisedSettings))} - {"seed"}
"""Settings that the samples do not depend on."""

Made = tuple[list[Sample], dict[str, Any]]
"""Samples, and what is reported about them."""


def made_from(agent: TokenSkip, workshop: Workshop) -> str:
    """Return a fingerprint of what the samples depend on."""
    content = {
        "settings": {
            key: value for key, value in vars(agent).items() if key not in _DECIDE_NOTHING
        },
        "model": model_fingerprint(workshop.checkpoint),
        "benchmark": workshop.benchmark_name,
        "tasks": [task.task_id for task in workshop.training_tasks],
    }
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def reused_samples(folder: Path, signature: str) -> Made | None:
    """Read the samples of a folder, or return None where it has none of that fingerprint."""
    path = folder / SAMPLES_FILE
    if not path.exists():
        return None
    head, *records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if head.pop("made_from") != signature:
        return None
    print(f"tokenskip: reused {path}", flush=True)
    return [Sample(**{**record, "messages": tuple(record["messages"])}) for record in records], head


def make_samples(agent: TokenSkip, workshop: Workshop, signature: str) -> Made:
    """Play the training tasks, prune the thoughts and write the samples.

    Raises:
        SettingError: if too few samples are left.
    """
    tasks = workshop.training_tasks[: agent.max_samples]
    episodes = workshop.play(CoT(style=agent.style), workshop.checkpoint, tasks, "collect")
    workshop.free()
    kept = _kept(agent, episodes)
    style = agent.style_for(workshop.benchmark)
    first = {task.task_id: workshop.benchmark.messages(task, style) for task in tasks}
    beginnings = [first[episode.task_id] for episode in kept]
    ratios = drawn_ratios(agent, len(kept))
    actions = pruned_actions(agent, workshop, kept, beginnings, ratios)
    samples: list[Sample] = []
    used: list[tuple[float, PrunedAction]] = []
    left_out: Counter[str] = Counter()
    for episode, beginning, ratio, turns in zip(kept, beginnings, ratios, actions, strict=True):
        found = _samples_of(episode, with_ratio(beginning, ratio, agent.delimiter), turns)
        for sample, turn in zip(found, turns, strict=True):
            if turn.reason:
                left_out[turn.reason] += 1
            elif len(samples) < agent.max_samples:
                samples.append(sample)
                used.append((ratio, turn))
    _check_samples(samples, left_out)
    report = {
        "importance": agent.importance,
        "num_episodes": len(episodes),
        "num_kept_episodes": len(kept),
        "num_samples": len(samples),
        "left_out": dict(left_out),
        **ratio_report(used),
    }
    lines = [{"made_from": signature, **report}, *map(vars, samples)]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(workshop.folder / SAMPLES_FILE, content)
    return samples, report


def _kept(agent: TokenSkip, episodes: Sequence[Episode]) -> list[Episode]:
    kept = [
        episode
        for episode in episodes
        if episode.steps and (agent.keeps_failures or episode.outcome.is_success)
    ]
    kind = "of any outcome" if agent.keeps_failures else "that succeeded"
    print(f"tokenskip: kept {len(kept)} of {len(episodes)} episodes, those {kind}", flush=True)
    if len(kept) < LEAST_SAMPLES:
        way_out = "" if agent.keeps_failures else ", or `methods.tokenskip.keeps_failures: true`"
        raise NothingToLearn(
            f"`methods.tokenskip` must have at least {LEAST_SAMPLES} training episodes {kind}, got "
            f"{len(kept)} of {len(episodes)}. Give more training tasks, a longer `max_tokens` or a "
            f"stronger `base_model`{way_out}."
        )
    return kept


def _samples_of(
    episode: Episode, beginning: Messages, turns: Sequence[PrunedAction]
) -> list[Sample]:
    """Return each action after the conversation so far, in which thoughts are pruned too."""
    messages = [dict(message) for message in beginning]
    samples: list[Sample] = []
    for step, turn in zip(episode.steps, turns, strict=True):
        samples.append(Sample(messages=tuple(messages), answer=turn.text, group=episode.task_id))
        messages.append({"role": "assistant", "content": turn.text})
        messages.append({"role": "user", "content": step.observation})
    return samples


def _check_samples(samples: Sequence[Sample], left_out: Counter[str]) -> None:
    reasons = ", ".join(f"{count} ({reason})" for reason, count in left_out.items()) or "none"
    print(f"tokenskip: {len(samples)} turns to train on, left out: {reasons}", flush=True)
    if len(samples) < LEAST_SAMPLES:
        raise NothingToLearn(
            f"`methods.tokenskip` must have at least {LEAST_SAMPLES} turns to train on, got "
            f"{len(samples)}, left out: {reasons}. Raise `methods.tokenskip.max_thought_tokens` or "
            "the limit in tokens of an action, give more training tasks, or choose a `base_model` "
            "that writes its thoughts."
        )


def drawn_ratios(agent: TokenSkip, count: int) -> list[float]:
    """Draw a ratio for each of `count` episodes."""
    random = np.random.default_rng(agent.seed)
    return [agent.ratios[index] for index in random.integers(len(agent.ratios), size=count)]


def ratio_report(used: Sequence[tuple[float, PrunedAction]]) -> dict[str, Any]:
    """Return asked and achieved ratios, in tokens of the thought: over all turns and apart."""
    by_ratio: dict[float, list[float]] = {}
    for ratio, turn in used:
        by_ratio.setdefault(ratio, []).append(turn.num_kept / turn.num_tokens)
    return {
        "asked_mean": float(np.mean([ratio for ratio, _ in used])),
        "achieved_mean": float(np.mean([turn.num_kept / turn.num_tokens for _, turn in used])),
        "ratios": {
            f"{ratio:g}": {"num_samples": len(values), "achieved_mean": float(np.mean(values))}
            for ratio, values in sorted(by_ratio.items())
        },
    }
