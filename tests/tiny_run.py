"""A run folder of the tiny model whose rollouts are there already, and a recording.

HumanEval's own solutions as actions.
"""

import json
from pathlib import Path

import numpy as np

from lar_lightning.base_models import load_tokenizer
from lar_lightning.benchmarks.benchmark import Task
from lar_lightning.rollouts.roll_out import file_settings, split_benchmark
from lar_lightning.run_folder import trajectory_path
from lar_lightning.settings import RolloutSettings
from lar_lightning.tokenizer import encode_text, render_chat
from lar_lightning.trajectories import ACTION, Span, Trajectory, TrajectoryFile, shard_path

ROLLOUTS = RolloutSettings(
    num_held_out=4, temperatures=(0.0,), held_out_temperatures=(0.0,), max_tokens=64
)
ROLLOUT_OPTIONS = [
    "--data.init_args.rollouts.num_held_out=4",
    "--data.init_args.rollouts.temperatures=[0.0]",
    "--data.init_args.rollouts.held_out_temperatures=[0.0]",
    "--data.init_args.rollouts.max_tokens=64",
]


def solution_trajectory(task: Task, checkpoint: Path, beginning: str = "") -> Trajectory:
    tokenizer = load_tokenizer(checkpoint)
    content = beginning + task.task_id
    prompt, spans = render_chat(tokenizer, [{"role": "user", "content": content}])
    lines = "".join(line for line in task.record["canonical_solution"].splitlines(True)[:4])
    text = f"```python\ndef {task.record['entry_point']}:\n{lines}```<|im_end|>"
    action = encode_text(tokenizer, text)[-96:]
    token_ids = np.asarray([*prompt, *action], dtype=np.int32)
    entropies = np.full(len(token_ids), np.nan, dtype=np.float32)
    entropies[len(prompt) :] = 0.1
    return Trajectory(
        trajectory_id=f"{task.task_id}@0#0",
        task_id=task.task_id,
        token_ids=token_ids,
        spans=(*spans, Span(role=ACTION, start=len(prompt), end=len(token_ids))),
        entropies=entropies,
        entropy_kind="exact",
        temperature=0.0,
        is_finished=True,
    )


def in_shards(run_dir: Path, count: int = 2) -> None:
    """Leave a run's rollouts as the tasks of a SLURM array leave them: in files of shards alone."""
    for path in list((run_dir / "trajectories").glob("*.jsonl")):
        header, *lines = path.read_text().splitlines(keepends=True)
        for index in range(count):
            shard_path(path, index, count).write_text("".join([header, *lines[index::count]]))
        path.unlink()


def make_tiny_run(run_dir: Path, checkpoint: Path, beginnings: tuple[str, ...] = ("",)) -> Path:
    """Write both trajectory files and return the folder; prompts begin in turn as is said."""
    settings = file_settings(checkpoint, "humaneval", ROLLOUTS)
    training, held_out = split_benchmark("humaneval", ROLLOUTS)
    for split, tasks in (("train", training), ("held_out", held_out)):
        file = TrajectoryFile(trajectory_path(run_dir, split), settings)  # type: ignore[arg-type]
        for index, task in enumerate(tasks):
            beginning = beginnings[index % len(beginnings)]
            file.append(solution_trajectory(task, checkpoint, beginning))
    return run_dir


NAMES = ("find", "total", "result", "numbers", "longest", "current")


def tiny_recording(path: Path, num_tasks: int = 20, num_trials: int = 2) -> Path:
    """Write episodes of two turns whose actions begin and end alike."""
    records = [
        {
            "id": f"{task}/{trial}",
            "task_id": f"task {task}",
            "messages": [
                {"role": "user", "content": f"Complete the function {NAMES[task % 6]}."},
                {"role": "assistant", "content": f"for i in range({task}):\n    return result"},
                {"role": "tool", "content": f"{task} numbers"},
                {"role": "assistant", "content": f"The function returns the text {trial}."},
            ],
        }
        for task in range(num_tasks)
        for trial in range(num_trials)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
