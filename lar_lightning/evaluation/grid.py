"""Methods x benchmarks x backbones x seeds: prepared, played and compared; it stops and goes on.

grid_dir/<backbone>/<benchmark>/<method>-seed<n>-<run>.jsonl   episodes
grid_dir/<backbone>/prepared/<method>/<trained on>-seed<n>/    what a method learned
grid_dir/<backbone>/prepared/rollouts/<trained on>-<settings>/ trajectories that LAR's runs share
grid_dir/cells.json                                            which files belong to the tables
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lar_lightning.agents import load_agent
from lar_lightning.agents.agent import Agent
from lar_lightning.agents.episode import Episode
from lar_lightning.agents.workshop import Prepared, Workshop
from lar_lightning.artefacts import write_json
from lar_lightning.base_models import load_tokenizer
from lar_lightning.benchmarks import (
    STYLES,
    Benchmark,
    Task,
    benchmark_identity,
    load_benchmark,
    split_benchmark,
)
from lar_lightning.errors import NothingToLearn, SettingError
from lar_lightning.evaluation.runner import (
    Course,
    Engine,
    Method,
    MethodRun,
    evaluate_method,
    open_engine,
)
from lar_lightning.policies import Request, Sampling, generate
from lar_lightning.run_folder import base_checkpoint
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import EvaluationSettings, GridSettings
from lar_lightning.tokenizer import decode, render_chat


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of the grid, played."""

    backbone: str
    benchmark: str
    method: str
    """Its label."""
    trained_on: str
    """Benchmark that it learned from, where that is another one."""
    seed: int
    runs: tuple[MethodRun, ...]
    groups: dict[str, str]
    """Part of the benchmark of each task, where it has parts."""
    prepared: Prepared


@dataclass(frozen=True, kw_only=True)
class Part:
    """A benchmark of the grid, with its tasks."""

    text: str
    """As the user wrote it."""
    benchmark: Benchmark
    training: list[Task]
    held_out: list[Task]

    @property
    def course(self) -> Course:
        """As it is played."""
        return Course(benchmark=self.benchmark, identity=benchmark_identity(self.text))


@dataclass(kw_only=True)
class Grid:
    """What is compared, read and checked before any long work."""

    grid_dir: Path
    backbones: dict[str, str]
    """Name in tables -> base model."""
    benchmarks: list[str]
    methods: dict[str, dict[str, Any] | None]
    """Label -> settings of the method. `lar@kodcode` is `lar` in tables; `agent` names the method
    where the label does not."""
    settings: GridSettings
    evaluation: EvaluationSettings
    agents: dict[str, Agent] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("backbones", "benchmarks", "methods"):
            if not getattr(self, name):
                raise SettingError(f"`{name}` must name one or more, got none.")
        self.agents = {
            label: load_agent(
                (settings or {}).get("agent", label.partition("@")[0]),
                {key: value for key, value in (settings or {}).items() if key != "agent"},
            )
            for label, settings in self.methods.items()
        }
        for agent in self.agents.values():
            agent.check()
        for text in self.benchmarks:
            self.part(text)
            for label, agent in self.agents.items():
                source = self.part(agent.source_for(text))
                if agent.needs_training_tasks and not source.training:
                    raise SettingError(
                        f"`methods.{label}` must have training tasks, got none: all records of "
                        f"`{source.text}` are held-out ones of its own split. Name records for "
                        f"training too, or `methods.{label}.trained_on` another benchmark."
                    )

    @cached_property
    def _parts(self) -> dict[str, Part]:
        return {}

    def part(self, text: str) -> Part:
        """Load a benchmark once."""
        if text not in self._parts:
            benchmark = load_benchmark(text)
            training, held_out = split_benchmark(
                benchmark, self.settings.num_held_out, self.settings.split_seed
            )
            self._parts[text] = Part(
                text=text,
                benchmark=benchmark,
                training=training[: self.settings.num_training],
                held_out=held_out,
            )
        return self._parts[text]

    def play(self) -> list[Cell]:
        """Play what is missing, backbone by backbone, and return all cells."""
        with open_engine(self.evaluation) as engine:
            cells = [cell for name in self.backbones for cell in self._play_backbone(name, engine)]
        write_json(self.grid_dir / "cells.json", [_cell_facts(cell) for cell in cells])
        return cells

    def _play_backbone(self, backbone: str, engine: Engine) -> Iterator[Cell]:
        base = base_checkpoint(self.backbones[backbone])
        wanted = [
            (label, agent, part, seed)
            for label, agent in self.agents.items()
            for part in map(self.part, self.benchmarks)
            if self._is_possible(label, agent, part)
            for seed in (self.settings.seeds if agent.learns else self.settings.seeds[:1])
        ]
        prepared: dict[tuple[str, str, int], Prepared | None] = {}
        # Those that learn last: the rest share one engine, and their results are there early.
        for label, agent, part, seed in sorted(wanted, key=lambda cell: cell[1].learns):
            source = self.part(agent.source_for(part.text))
            key = (label, source.text, seed)
            if key not in prepared:
                workshop = self._workshop(backbone, base, label, source, seed, engine)
                if agent.learns:
                    print(f"prepare: {label} on {source.benchmark.name}, seed {seed}", flush=True)
                    engine.close()
                prepared[key] = _prepared(agent, workshop, label)
            ready = prepared[key]
            if ready is not None:
                yield self._play_cell(backbone, label, part, seed, ready, engine)

    def _is_possible(self, label: str, agent: Agent, part: Part) -> bool:
        """Tell whether a cell is other than Vanilla's: ReAct without turns is not (paper, Table 1).

        What works on top of turns (ACON, LAR) takes the benchmark as it is.
        """
        if agent.name in part.benchmark.styles or agent.name not in STYLES:
            return True
        print(f"ablate: {label} is left out on {part.benchmark.name}, which has no such style")
        return False

    def _play_cell(
        self, backbone: str, label: str, part: Part, seed: int, prepared: Prepared, engine: Engine
    ) -> Cell:
        vocabulary, source = prepared.latent_vocabulary, prepared.agent.source_for(part.text)
        method = Method(
            label=f"{label}-seed{seed}",
            agent=prepared.agent,
            checkpoint=prepared.checkpoint,
            vocabulary=None if vocabulary is None else LatentVocabulary.load(vocabulary),
        )
        # Vanilla's second run is the floor that agreement is measured against.
        num_runs = self.evaluation.num_runs if prepared.agent.name == "vanilla" else 1
        runs = evaluate_method(
            method,
            part.course,
            part.held_out,
            self.grid_dir / backbone / part.benchmark.name,
            self.evaluation,
            engine,
            num_runs,
        )
        return Cell(
            backbone=backbone,
            benchmark=part.benchmark.name,
            method=label,
            trained_on="" if source == part.text else self.part(source).benchmark.name,
            seed=seed,
            runs=tuple(replace(run, method=label) for run in runs),
            groups={task.task_id: task.group for task in part.held_out if task.group},
            prepared=prepared,
        )

    def _workshop(
        self, backbone: str, base: Path, label: str, source: Part, seed: int, engine: Engine
    ) -> Workshop:
        prepared = self.grid_dir / backbone / "prepared"
        folder = prepared / label / f"{source.benchmark.name}-seed{seed}"

        def play(
            agent: Agent, checkpoint: Path, tasks: Sequence[Task], label: str
        ) -> list[Episode]:
            method = Method(label=label, agent=agent, checkpoint=checkpoint)
            (run,) = evaluate_method(
                method, source.course, tasks, folder, self.evaluation, engine, num_runs=1
            )
            by_id = {episode.task_id: episode for episode in run.episodes}
            return [by_id[task.task_id] for task in tasks]

        def write(checkpoint: Path, messages: Sequence[str], max_tokens: int) -> list[str]:
            tokenizer = load_tokenizer(checkpoint)
            chats = [[{"role": "user", "content": message}] for message in messages]
            requests = [
                Request(
                    request_id=str(index),
                    prompt_ids=render_chat(tokenizer, chat)[0],
                    temperature=0.0,
                )
                for index, chat in enumerate(chats)
            ]
            longest = max((len(request.prompt_ids) for request in requests), default=0)
            policy = engine.serve(checkpoint, longest + max_tokens)
            written = {
                completion.request_id: decode(
                    tokenizer, completion.token_ids, skip_special_tokens=True
                )
                for completion in generate(policy, requests, Sampling(max_tokens=max_tokens))
            }
            return [written[request.request_id] for request in requests]

        return Workshop(
            base_model=self.backbones[backbone],
            checkpoint=base,
            benchmark=source.benchmark,
            benchmark_name=source.text,
            training_tasks=source.training,
            held_out_ids=frozenset(task.task_id for task in source.held_out),
            folder=folder,
            seed=seed,
            num_held_out=self.settings.num_held_out,
            split_seed=self.settings.split_seed,
            max_tokens=self.evaluation.max_tokens,
            max_model_len=self.evaluation.max_model_len,
            tokenizer=load_tokenizer(base),
            play=play,
            write=write,
            free=engine.close,
        )


def _prepared(agent: Agent, workshop: Workshop, label: str) -> Prepared | None:
    """Get a method ready; None, with the reason said, where it finds nothing to learn from."""
    try:
        return agent.prepare(workshop)
    except NothingToLearn as error:
        print(f"ablate: {label} is left out on {workshop.benchmark.name}: {error}", flush=True)
        return None


def _cell_facts(cell: Cell) -> dict[str, Any]:
    return {
        "backbone": cell.backbone,
        "benchmark": cell.benchmark,
        "method": cell.method,
        "seed": cell.seed,
        "checkpoint": str(cell.prepared.checkpoint),
        "num_runs": len(cell.runs),
        "num_episodes": len(cell.runs[0].episodes),
        "num_failed": sum(bool(episode.failure) for episode in cell.runs[0].episodes),
    }
