"""What mining found: one description for the terminal, for JSON and for a page.

Savings on the mined trajectories flatter; what counts are the held-out ones (algorithm 2.4).
"""

import unicodedata
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lar_lightning.artefacts import write_json, write_text
from lar_lightning.mining.corpus import Corpus, corpus_of
from lar_lightning.mining.coverage import Coverage, coverage_of, usage_of
from lar_lightning.mining.curves import saving_by_budget, saving_by_entropy
from lar_lightning.mining.executability import compare_with_tokenizer, texts_of
from lar_lightning.mining.mine import Mined, chosen_trajectories, search_limits
from lar_lightning.mining.plots import number, percent, plot_by_budget, plot_by_entropy
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.settings import MiningSettings
from lar_lightning.tokenizer import decode
from lar_lightning.trajectories import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SCHEMA = 1
CONTEXT = 16
"""Tokens of an example on either side."""
MAX_REFUSED = 200
"""Refused segments that are listed."""
JSON_NAME, PAGE_NAME = "mining_report.json", "mining_report.html"

Description = dict[str, Any]


def describe(
    mined: Mined,
    trajectories: Sequence[Trajectory],
    held_out: Sequence[Trajectory],
    tokenizer: "PreTrainedTokenizerFast",
    settings: MiningSettings,
) -> Description:
    """Return all that the reports say.

    Args:
        mined: The result.
        trajectories: That were mined.
        held_out: Of other tasks.
        tokenizer: Of the base model.
        settings: Of the mining.
    """
    vocabulary, corpus = mined.vocabulary, mined.corpus
    trajectories = chosen_trajectories(trajectories, settings)
    # what is served like the mined ones, where there are such
    held_out = [t for t in held_out if settings.temperature in (None, t.temperature)] or held_out
    held_out_corpus = corpus_of(held_out)
    comparison = compare_with_tokenizer(tokenizer, vocabulary, texts_of(held_out, tokenizer))
    is_action = corpus.is_action
    parameters = mined.parameters
    return {
        "schema": SCHEMA,
        "num_trajectories": len(trajectories),
        "num_held_out": len(held_out),
        "num_tasks": corpus.num_tasks,
        "entropy_kind": mined.entropy_kind,
        "shares": {
            "digits, special tokens and broken characters": _mean(parameters.kinds[is_action]),
            "matches of parameter patterns": _mean(parameters.patterns[is_action]),
            "values of slots": _mean(parameters.slots[is_action]),
            "decisions": _mean(corpus.has_decision[is_action]),
        },
        "coverage": {
            "mined": _described(coverage_of(vocabulary, trajectories)),
            "held_out": _described(coverage_of(vocabulary, held_out)),
        },
        "tokenizer": {
            "different_share_mined": round(mined.comparison.different_share, 6),
            "different_share_held_out": round(comparison.different_share, 6),
            "num_units_held_out": comparison.num_units,
            "differences": [asdict(difference) for difference in comparison.examples],
        },
        "latents": _latents(vocabulary, corpus, held_out_corpus, tokenizer),
        "refused": [
            {"text": decode(tokenizer, segment), "reason": str(refusal)}
            for segment, refusal in list(mined.stability.refused.items())[:MAX_REFUSED]
        ],
        "num_refused": len(mined.stability.refused),
        "refused_realizations": [
            {
                "text": decode(tokenizer, canonical),
                "realization": decode(tokenizer, verdict.realization),
                "mean_divergence": verdict.mean_divergence,
                "num_contexts": verdict.num_contexts,
            }
            for canonical, verdicts in mined.refused_realizations.items()
            for verdict in verdicts
        ],
        "by_budget": [
            asdict(point) for point in saving_by_budget(vocabulary, corpus, held_out_corpus)
        ],
        "by_entropy": [
            asdict(point)
            for point in saving_by_entropy(
                corpus,
                held_out_corpus,
                search_limits(settings, corpus.num_tasks),
                base_size=vocabulary.base_size,
                is_admissible=mined.stability.admits,
            )
        ],
        "max_entropy": settings.max_entropy,
    }


def facts_of(description: Description) -> dict[str, Any]:
    """Return the few figures that the vocabulary itself keeps."""
    held_out = description["coverage"]["held_out"]
    return {
        "num_tokens": description["coverage"]["mined"]["action_tokens"],
        "num_tasks": description["num_tasks"],
        "saved_held_out": held_out["action_saving"],
        "prompt_saved_held_out": held_out["prompt_saving"],
        "num_refused": description["num_refused"],
        "different_share": description["tokenizer"]["different_share_held_out"],
        "entropy_kind": description["entropy_kind"],
    }


def _mean(values: np.ndarray) -> float:
    return round(float(values.mean()), 4) if len(values) else 0.0


def _described(coverage: Coverage) -> dict[str, float]:
    return {
        **asdict(coverage),
        "action_saving": round(coverage.action_saving, 4),
        "prompt_saving": round(coverage.prompt_saving, 4),
        "rate": round(coverage.rate, 4),
        "gap_to_fewest": round(coverage.gap_to_fewest, 4),
    }


def _latents(
    vocabulary: LatentVocabulary,
    corpus: Corpus,
    held_out: Corpus,
    tokenizer: "PreTrainedTokenizerFast",
) -> list[dict[str, Any]]:
    usage, held_out_usage = (
        usage_of(each, vocabulary.automaton, len(vocabulary)) for each in (corpus, held_out)
    )
    return [
        {
            "id": vocabulary.base_size + index,
            "text": latent.text,
            "num_tokens": len(latent.segment),
            "rank": latent.rank,
            "count": int(usage.counts[index]),
            "support": int(usage.supports[index]),
            "entropy": latent.inner_entropy,
            "saved": int(usage.counts[index]) * (len(latent.segment) - 1),
            "held_out_count": int(held_out_usage.counts[index]),
            "held_out_saved": int(held_out_usage.counts[index]) * (len(latent.segment) - 1),
            "example": _example(corpus, int(usage.first_places[index]), latent, tokenizer),
            "realizations": [decode(tokenizer, other) for other in latent.realizations],
        }
        for index, latent in enumerate(vocabulary.latents)
    ]


def _example(
    corpus: Corpus, place: int, latent: LatentAction, tokenizer: "PreTrainedTokenizerFast"
) -> list[str]:
    """Return the text before the latent, its own, and the text behind it."""
    if place < 0:
        return ["", latent.text, ""]
    starts = corpus.starts
    span = int(np.searchsorted(starts, place, side="right"))
    first = int(starts[span - 1])
    last = int(starts[span]) if span < len(starts) else len(corpus)
    end = place + len(latent.segment)
    return [
        decode(tokenizer, corpus.tokens[max(first, place - CONTEXT) : place]),
        latent.text,
        decode(tokenizer, corpus.tokens[end : min(end + CONTEXT, last)]),
    ]


def text_report(description: Description, num_latents: int = 12) -> str:
    """Return some lines for the terminal."""
    coverage = description["coverage"]
    lines = [
        f"{len(description['latents'])} latent actions from {description['num_trajectories']} "
        f"trajectories of {description['num_tasks']} tasks; entropy: {description['entropy_kind']}",
        "saved                 mined  held out",
    ]
    for name, key in (
        ("generated tokens", "action_saving"),
        ("prompt tokens", "prompt_saving"),
        ("rate r", "rate"),
        ("gap to fewest units", "gap_to_fewest"),
    ):
        lines.append(
            f"{name:<20} {coverage['mined'][key]:>6.1%}  {coverage['held_out'][key]:>8.1%}"
        )
    share = description["tokenizer"]["different_share_held_out"]
    lines.append(f"units the extended tokenizer cuts otherwise, held out: {share:.3%}")
    marks = ", ".join(f"{share:.1%} {name}" for name, share in description["shares"].items())
    lines.append(f"of the action tokens {marks}")
    lines.append(f"{description['num_refused']} segments refused: their text does not survive")
    lines.append("rank  saved  tasks  entropy  text")
    best = sorted(description["latents"], key=lambda latent: latent["rank"])[:num_latents]
    for latent in best:
        entropy = "-" if latent["entropy"] is None else f"{latent['entropy']:.2f}"
        lines.append(
            f"{latent['rank']:>4} {latent['saved']:>6} {latent['support']:>6} {entropy:>8}  "
            f"{latent['text']!r}"
        )
    return "\n".join(lines)


def write_reports(run_dir: Path, description: Description, title: str) -> None:
    """Write the JSON and the page into a run folder."""
    write_json(run_dir / JSON_NAME, description)
    page = render(description, title)
    # A lone surrogate, which JSON can hold, cannot be written.
    write_text(run_dir / PAGE_NAME, page.encode("utf-8", "replace").decode("utf-8"))


def render(description: Description, title: str) -> str:
    """Return the page: one HTML file that needs nothing else and runs no script but its own."""
    from jinja2 import Environment, StrictUndefined

    template = files("lar_lightning.mining").joinpath("report.html.jinja").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=number,
        percent=percent,
        marked=marked_runs,
        spaces=visible_spaces,
        by_reason=by_reason,
        digest=_digest,
        by_budget=plot_by_budget,
        by_entropy=plot_by_entropy,
    )
    environment.globals.update(parted=parted_units)
    return environment.from_string(template).render(title=title, **description)


def visible_spaces(text: str) -> list[tuple[str, bool]]:
    """Split text into runs for one line; True where a run marks what cannot be seen.

    Line breaks and tabs are marked, and spaces where they could be overlooked: at ends of lines.
    """
    runs: list[tuple[str, bool]] = []
    for index, line in enumerate(text.split("\n")):
        if index:
            runs.append(("\u23ce", True))
        inner = line.strip(" ")
        start = len(line) - len(line.lstrip(" ")) if inner else len(line)
        runs.append(("\u00b7" * start, True))
        runs += marked_runs(inner)
        runs.append(("\u00b7" * (len(line) - start - len(inner)), True))
    return [(run, is_mark) for run, is_mark in runs if run]


def marked_runs(text: str) -> list[tuple[str, bool]]:
    """Split text into runs; True where a run marks tabs, or characters that hide or reorder others.

    Line breaks and spaces stay as they are.
    """
    runs: list[tuple[str, bool]] = []
    for character in text:
        is_mark = character != "\n" and unicodedata.category(character) in ("Cc", "Cf", "Cs")
        if character == "\t":
            shown = "\u21e5"
        else:
            shown = character.encode("unicode_escape").decode() if is_mark else character
        if runs and runs[-1][1] == is_mark:
            runs[-1] = (runs[-1][0] + shown, is_mark)
        else:
            runs.append((shown, is_mark))
    return runs


def parted_units(units: Sequence[str], others: Sequence[str]) -> list[tuple[str, bool]]:
    """Return the units of one cut of a text; True where the other cut has no such unit.

    Both begin at the same place. Of units behind the end of `others` nothing is known.
    """

    def placed(cut: Sequence[str]) -> list[tuple[int, str]]:
        return list(zip(accumulate(map(len, cut), initial=0), cut, strict=False))

    there, end = set(placed(others)), sum(map(len, others))
    return [(unit, start < end and (start, unit) not in there) for start, unit in placed(units)]


def by_reason(refused: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Group the texts of refused segments, the most frequent reason first."""
    texts: dict[str, list[str]] = {}
    for segment in refused:
        texts.setdefault(segment["reason"], []).append(segment["text"])
    return sorted(texts.items(), key=lambda item: -len(item[1]))


def _digest(script: str) -> str:
    """Return what a content security policy calls a script."""
    return "sha256-" + b64encode(sha256(script.encode()).digest()).decode()
