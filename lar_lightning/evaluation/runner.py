"""One method on the tasks of a benchmark: generate, expand, decode, score.

Every finished episode is kept on disk.
"""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lar_lightning.artefacts import write_json
from lar_lightning.base_models import load_tokenizer, model_fingerprint
from lar_lightning.benchmarks import load_benchmark
from lar_lightning.benchmarks.benchmark import Task
from lar_lightning.benchmarks.sandbox import isolation_report
from lar_lightning.policies import Policy, Request, Sampling, open_policy
from lar_lightning.rollouts import check_lengths
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import EvaluationSettings
from lar_lightning.tokenizer import decode, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One answered task."""

    task_id: str
    text: str
    """What the environment reads: expanded, without special tokens."""
    units: tuple[int, ...]
    """What was generated, cut where the expansion reaches `max_tokens`."""
    num_prompt_units: int
    num_expanded_tokens: int
    """Base tokens that the units stand for."""
    num_latents: int
    num_places: int
    """Latents that the code of the same text has: where one could have been."""
    is_finished: bool
    is_success: bool
    detail: str
    """The scorer's word."""


@dataclass(frozen=True, kw_only=True)
class MethodRun:
    """One method, once over all tasks."""

    method: str
    run: int
    wall_clock_seconds: float
    """Of generation alone, first request to last answer, engine loaded."""
    num_generated_units: int
    """All that the engine generated, also what the cut at `max_tokens` expanded tokens dropped."""
    episodes: tuple[Episode, ...]


def evaluate_method(
    method: str,
    checkpoint: Path,
    vocabulary: LatentVocabulary,
    benchmark: str,
    tasks: Sequence[Task],
    folder: Path,
    settings: EvaluationSettings,
) -> list[MethodRun]:
    """Run a method's checkpoint `num_runs` times.

    Runs that are on disk with the same settings are reused.
    """
    signature = {
        "checkpoint": model_fingerprint(checkpoint),
        "tasks": sorted(task.task_id for task in tasks),
        "settings": asdict(settings),
    }
    paths = [folder / f"{method}-{run}.json" for run in range(settings.num_runs)]
    runs = {run: stored for run, path in enumerate(paths) if (stored := _stored(path, signature))}
    print(
        f"evaluate ({method}): {len(runs)} runs reused, {settings.num_runs - len(runs)} to make",
        flush=True,
    )
    if len(runs) < settings.num_runs:
        tokenizer = load_tokenizer(checkpoint)
        opened = open_policy(
            checkpoint,
            settings.engine,
            num_concurrent=settings.num_concurrent,
            max_model_len=settings.max_model_len,
        )
        with opened as policy:
            _warm_up(policy, tokenizer)
            for run in set(range(settings.num_runs)) - set(runs):
                made = _run(method, run, policy, tokenizer, vocabulary, tasks, settings)
                runs[run] = _scored(made, benchmark, tasks)
                write_json(paths[run], {"signature": signature, "run": asdict(runs[run])})
    return [runs[run] for run in range(settings.num_runs)]


def _stored(path: Path, signature: dict[str, Any]) -> MethodRun | None:
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["signature"] != signature:
        return None
    episodes = tuple(
        Episode(**{**episode, "units": tuple(episode["units"])})
        for episode in content["run"]["episodes"]
    )
    return MethodRun(**{**content["run"], "episodes": episodes})


def _warm_up(policy: Policy, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Let the engine compile and allocate before the clock runs."""
    ids, _ = render_chat(tokenizer, [{"role": "user", "content": "Warm up."}])
    list(policy.generate([Request(request_id="warm-up", prompt_ids=ids)], Sampling(max_tokens=8)))


def _run(
    method: str,
    run: int,
    policy: Policy,
    tokenizer: "PreTrainedTokenizerFast",
    vocabulary: LatentVocabulary,
    tasks: Sequence[Task],
    settings: EvaluationSettings,
) -> MethodRun:
    prompts = {task.task_id: render_chat(tokenizer, task.messages)[0] for task in tasks}
    check_lengths(
        {name: len(ids) for name, ids in prompts.items()},
        settings.max_tokens,
        settings.max_model_len,
    )
    # Runs of one engine differ in what is decoded together, as two days in production do.
    order = sorted(prompts) if run % 2 == 0 else sorted(prompts, reverse=True)
    requests = [
        Request(request_id=task_id, prompt_ids=prompts[task_id], temperature=0.0)
        for task_id in order
    ]
    sampling = Sampling(max_tokens=settings.max_tokens)
    num_generated = 0
    episodes: dict[str, Episode] = {}
    started = time.perf_counter()
    with tqdm(
        total=len(requests), desc=f"evaluate {method} run {run}", unit="task", mininterval=1.0
    ) as progress:
        for completion in policy.generate(requests, sampling):
            num_generated += len(completion.token_ids)
            units = cut(vocabulary, completion.token_ids, settings.max_tokens)
            is_whole = completion.is_finished and len(units) == len(completion.token_ids)
            episodes[completion.request_id] = _episode(
                completion.request_id,
                units,
                len(prompts[completion.request_id]),
                is_whole,
                tokenizer,
                vocabulary,
            )
            progress.update()
    seconds = time.perf_counter() - started
    return MethodRun(
        method=method,
        run=run,
        wall_clock_seconds=round(seconds, 3),
        num_generated_units=num_generated,
        episodes=tuple(episodes[task_id] for task_id in sorted(episodes)),
    )


def cut(vocabulary: LatentVocabulary, units: Sequence[int], max_tokens: int) -> list[int]:
    """Keep the units whose expansion fits into `max_tokens` base tokens."""
    kept, num_tokens = [], 0
    for unit, length in zip(units, vocabulary.lengths(units), strict=True):
        num_tokens += length
        if num_tokens > max_tokens:
            break
        kept.append(unit)
    return kept


def _episode(
    task_id: str,
    units: list[int],
    num_prompt_units: int,
    is_finished: bool,
    tokenizer: "PreTrainedTokenizerFast",
    vocabulary: LatentVocabulary,
) -> Episode:
    expanded = vocabulary.expand(units)
    return Episode(
        task_id=task_id,
        text=decode(tokenizer, units, skip_special_tokens=True),
        units=tuple(units),
        num_prompt_units=num_prompt_units,
        num_expanded_tokens=len(expanded),
        num_latents=sum(map(vocabulary.is_latent, units)),
        num_places=sum(map(vocabulary.is_latent, vocabulary.encode(expanded))),
        is_finished=is_finished,
        is_success=False,
        detail="not scored",
    )


def _scored(run: MethodRun, benchmark: str, tasks: Sequence[Task]) -> MethodRun:
    for sentence in isolation_report():
        print(f"evaluate: model-written code is not fully isolated here: {sentence}", flush=True)
    scorer = load_benchmark(benchmark)
    by_id = {task.task_id: task for task in tasks}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(
            lambda episode: scorer.score(by_id[episode.task_id], episode.text), run.episodes
        )
        progress = tqdm(
            outcomes, total=len(run.episodes), desc="scoring", unit="task", mininterval=1.0
        )
        scored = [
            replace(episode, is_success=outcome.is_success, detail=outcome.detail)
            for episode, outcome in zip(run.episodes, progress, strict=True)
        ]
    return replace(run, episodes=tuple(scored))
