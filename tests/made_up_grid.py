"""Made-up episodes of a small grid, for tests of results, tables, figures and the page."""

import numpy as np

from lar_lightning.agents.episode import Episode, RequestRecord, StepRecord
from lar_lightning.benchmarks.benchmark import Outcome
from lar_lightning.evaluation.results.cells import CellRun

CHANCES = {"vanilla": 0.6, "cot": 0.62, "react": 0.75, "acon": 0.45, "lar": 0.78}
"""Of solving a task."""
LENGTHS = {"vanilla": 100, "cot": 130, "react": 150, "acon": 80, "lar": 70}
"""Units of an action."""


def make_request(
    num_units: int = 10,
    *,
    prompt: int = 100,
    expanded: int | None = None,
    num_latents: int = 0,
    num_places: int = 0,
    purpose: str = "act",
    is_finished: bool = True,
) -> RequestRecord:
    return RequestRecord(
        purpose=purpose,  # type: ignore[arg-type]
        num_prompt_units=prompt,
        units=tuple(range(num_units)),
        num_expanded_tokens=num_units if expanded is None else expanded,
        num_latents=num_latents,
        num_places=num_places,
        is_finished=is_finished,
    )


def make_episode(
    task: str = "t0",
    *,
    is_success: bool = True,
    requests: tuple[RequestRecord, ...] | None = None,
    texts: tuple[str, ...] = ("an action",),
    failure: str = "",
    metrics: dict[str, float] | None = None,
    num_hint_units: int = 0,
    seconds: float = 1.0,
) -> Episode:
    return Episode(
        task_id=task,
        outcome=Outcome(
            task_id=task, is_success=is_success, detail="made up", metrics=metrics or {}
        ),
        failure=failure,
        requests=(make_request(),) if requests is None else requests,
        steps=tuple(
            StepRecord(action=text, observation="seen", num_hint_units=num_hint_units)
            for text in texts
        ),
        seconds=seconds,
    )


def make_run(
    episodes: list[Episode],
    *,
    method: str = "vanilla",
    benchmark: str = "triviaqa",
    backbone: str = "Qwen/Qwen3-8B",
    learned_on: str = "",
    seed: int = 0,
    run: int = 0,
    seconds: float = 10.0,
    rate: float | None = None,
) -> CellRun:
    return CellRun(
        backbone=backbone,
        benchmark=benchmark,
        method=method,
        learned_on=learned_on,
        seed=seed,
        run=run,
        episodes=tuple(episodes),
        wall_clock_seconds=seconds,
        reparameterization_rate=rate,
        mined_rate=rate,
    )


def draw_run(
    method: str,
    benchmark: str,
    backbone: str,
    *,
    seed: int = 0,
    run: int = 0,
    learned_on: str = "",
    num_tasks: int = 60,
    chance: float | None = None,
    rate: float | None = None,
) -> CellRun:
    """Draw a run whose tasks have a difficulty of their own, the same for all methods."""
    difficulty = np.random.default_rng(len(benchmark)).random(num_tasks)
    noise = np.random.default_rng([seed, run, len(method), len(backbone)])
    chance = CHANCES[method] if chance is None else chance
    is_lar = method == "lar"
    episodes = []
    for index in range(num_tasks):
        num_units = int(LENGTHS[method] * noise.uniform(0.8, 1.2))
        request = make_request(
            num_units,
            prompt=300,
            expanded=int(num_units * 1.4) if is_lar else num_units,
            num_latents=num_units // 5 if is_lar else 0,
            num_places=num_units // 4 if is_lar else 0,
            is_finished=index != 7,
        )
        helper = make_request(40, prompt=500, purpose="help")
        fails = method == "acon" and index < 3
        episodes.append(
            make_episode(
                f"{benchmark}/{index}",
                is_success=bool(difficulty[index] + noise.normal(0, 0.15) < chance) and not fails,
                requests=(request, request, *([helper] if method == "acon" else [])),
                texts=(f"search {index}", f"answer {index} {'x' * (run + 3)}"),
                failure="the environment gave no answer in 60 s" if fails else "",
                metrics={"f1": float(noise.random())},
                seconds=noise.uniform(1, 3),
            )
        )
    return make_run(
        episodes,
        method=method,
        benchmark=benchmark,
        backbone=backbone,
        learned_on=learned_on,
        seed=seed,
        run=run,
        seconds=30 + run,
        rate=rate,
    )


def draw_grid() -> list[CellRun]:
    """Draw two backbones, four benchmarks, five methods, with a transfer from KodCode."""
    runs = [
        draw_run(method, benchmark, backbone, seed=seed, run=run, rate=rate)
        for backbone in ("Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct")
        for benchmark in ("triviaqa", "kodcode", "mind2web", "humaneval")
        for method in CHANCES
        if (method, benchmark) not in (("react", "mind2web"), ("lar", "humaneval"))
        for seed in ((0, 1, 2) if method == "lar" else (0,))
        for run in range(2)
        for rate in (0.3 if method == "lar" else None,)
    ]
    transfer = [
        draw_run("lar", "humaneval", "Qwen/Qwen3-8B", seed=seed, learned_on="kodcode")
        for seed in (0, 1, 2)
    ]
    return runs + transfer


def mind2web_groups() -> dict[str, dict[str, str]]:
    """Return the groups of the drawn tasks."""
    names = ("cross_task", "cross_website", "cross_domain")
    return {"mind2web": {f"mind2web/{index}": names[index % 3] for index in range(60)}}


def draw_strengths(
    benchmark: str, chances: dict[float, float], num_tasks: int = 200
) -> list[list[CellRun]]:
    """Draw LAR at growing rates: rate -> chance of solving a task."""
    return [
        [
            draw_run(
                "lar",
                benchmark,
                "Qwen/Qwen3-8B",
                seed=seed,
                run=int(1000 * rate),
                num_tasks=num_tasks,
                chance=chance,
                rate=rate,
            )
            for seed in (0, 1, 2)
        ]
        for rate, chance in chances.items()
    ]
