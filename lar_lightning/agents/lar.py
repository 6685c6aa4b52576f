"""LAR: latent actions, mined from the model's own trajectories and distilled (the whole paper)."""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from lar_lightning.agents.agent import TurnAgent
from lar_lightning.agents.subprograms import run_program
from lar_lightning.artefacts import write_json
from lar_lightning.errors import SettingError

if TYPE_CHECKING:
    from lar_lightning.agents.workshop import Prepared, Workshop

MADE_WITH = "made_with.json"
"""In a run that is done: the settings of `fit`."""
_AFTER_ROLLOUTS = (
    "--model.",
    "--trainer.",
    "--data.init_args.mining.",
    "--data.init_args.loading.",
)


@dataclass(frozen=True, kw_only=True)
class Lar(TurnAgent):
    """The student that acts in latents; told of tasks as the policy that it was distilled from."""

    name: ClassVar[str] = "lar"

    run_dir: str = ""
    """A run that is trained already; default: one is trained in the grid's folder."""
    config: str = ""
    """YAML of `fit` for that, as in `configs/`; base model, benchmark and split come from the
    grid."""
    options: tuple[str, ...] = ()
    """More options of `fit`, e.g. `--data.init_args.mining.max_latents=64`."""

    @property
    def learns(self) -> bool:
        """A student is trained with each seed, unless a run is named."""
        return not self.run_dir

    def check(self) -> None:
        """Refuse a run that is not trained, or a configuration that is not there.

        Raises:
            SettingError: If neither a trained run nor a configuration is named.
        """
        from lar_lightning.recovery.checkpoints import newest_whole
        from lar_lightning.run_folder import checkpoint_path

        if self.run_dir:
            last = checkpoint_path(Path(self.run_dir))
            if newest_whole(last) is None:
                raise SettingError(
                    f"`methods.lar.run_dir` must be a trained run, got {self.run_dir!r} without "
                    f"{last.name}. Run the verb `fit` first, or name a `config`."
                )
        elif not self.config or not Path(self.config).is_file():
            raise SettingError(
                "`methods.lar.config` must be a YAML file for `fit` where `methods.lar.run_dir` is "
                f"not given, got {self.config!r}. See configs/tool_calls.yaml."
            )

    def prepare(self, workshop: "Workshop") -> "Prepared":
        """Train (`fit` goes on where it was stopped) and export.

        Raises:
            SettingError: If training fails.
        """
        from lar_lightning.agents.workshop import Prepared
        from lar_lightning.export.checkpoint import export_run
        from lar_lightning.run_folder import vocabulary_path

        run_dir = Path(self.run_dir) if self.run_dir else workshop.folder / "run"
        if not self.run_dir:
            self._train(workshop, run_dir)
        check_held_out(run_dir, workshop.held_out_ids)
        export = export_run(workshop.base_model, run_dir)
        return Prepared(
            agent=self,
            checkpoint=export,
            latent_vocabulary=vocabulary_path(export),
            mined_rate=mined_rate(run_dir, export),
        )

    def _train(self, workshop: "Workshop", run_dir: Path) -> None:
        rollouts = "--data.init_args.rollouts"
        # In a process of its own: training leaves nothing behind in this one, and the engine that
        # rolls out is freed with it.
        options = [
            *("--base_model", workshop.base_model),
            *("--benchmark", workshop.benchmark_name),
            *("--seed_everything", str(workshop.seed)),
            *(f"{rollouts}.style", self.style_for(workshop.benchmark)),
            *(f"{rollouts}.num_held_out", str(workshop.num_held_out)),
            *(f"{rollouts}.num_training", str(len(workshop.training_tasks))),
            *(f"{rollouts}.split_seed", str(workshop.split_seed)),
            *(f"{rollouts}.max_tokens", str(workshop.max_tokens)),
            *(f"{rollouts}.max_model_len", str(workshop.max_model_len)),
            *self.options,
        ]
        settings = ["--config", self.config, *options]
        made_with = {"settings": settings, "config": Path(self.config).read_text(encoding="utf-8")}
        if _is_trained(run_dir, made_with):
            return
        share_rollouts(
            workshop.folder, workshop.benchmark.name, run_dir, options, made_with["config"]
        )
        # The folder last: what comes before a `--config` is overridden by it.
        command = ["-m", "lar_lightning", "fit", *settings, "--run_dir", str(run_dir)]
        print(f"lar: {' '.join(command)}", flush=True)
        code = run_program([sys.executable, *command])
        if code != 0:
            raise SettingError(
                f"`methods.lar` could not be trained: `fit` ended with status {code}; what it said "
                "stands above. Mend that and run the grid again: it goes on where it was."
            )
        write_json(run_dir / MADE_WITH, {**made_with, "is_done": True})


def mined_rate(run_dir: Path, export: Path) -> float | None:
    """Return the share of a run's training action tokens inside the latents of its export.

    None where the run keeps no trajectories.
    """
    from lar_lightning.mining.corpus import corpus_of
    from lar_lightning.mining.coverage import rate
    from lar_lightning.run_folder import trajectory_path
    from lar_lightning.segments import LatentVocabulary
    from lar_lightning.trajectories import read_trajectories, trajectory_files

    path = trajectory_path(run_dir, "train")
    if not trajectory_files(path):
        return None
    return rate(corpus_of(read_trajectories(path)), LatentVocabulary.load(export).automaton)


def share_rollouts(
    folder: Path, benchmark: str, run_dir: Path, options: list[str], config: str
) -> None:
    """Give a run the trajectories of all runs of the grid that roll out with the same settings.

    Seeds of training, strengths and other settings of what comes later do not touch rollouts, which
    take as long as training. Nothing changes for a run that has trajectories of its own already.

    Args:
        folder: The workshop's.
        benchmark: Name of the benchmark that is learned from.
        run_dir: Folder of the run, perhaps not there yet.
        options: Of `fit`, without its YAML; one that is stacked on that counts.
        config: Text of its YAML.
    """
    trajectories = run_dir / "trajectories"
    if trajectories.exists():
        return
    tree: dict[str, Any] = yaml.safe_load(config) or {}
    for later in ("model", "trainer", "seed_everything", "run_dir"):
        tree.pop(later, None)
    data = tree.get("data")
    arguments = data.get("init_args") if isinstance(data, dict) else None
    for later in ("mining", "loading"):
        (arguments or {}).pop(later, None)
    deciding = [
        f"{name} {value}"
        for name, value in _pairs(options)
        if not name.startswith((*_AFTER_ROLLOUTS, "--seed_everything"))
    ]
    text = json.dumps([tree, deciding], sort_keys=True, default=str)
    name = f"{benchmark}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    shared = folder.parents[1] / "rollouts" / name
    shared.mkdir(parents=True, exist_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    trajectories.unlink(missing_ok=True)  # a link to what has been removed
    trajectories.symlink_to(os.path.relpath(shared, run_dir), target_is_directory=True)


def _pairs(options: list[str]) -> list[tuple[str, str]]:
    """Return name and value of options that are written `--name value` or `--name=value`."""
    pairs: list[tuple[str, str]] = []
    for text in options:
        if text.startswith("--"):
            name, _, value = text.partition("=")
            pairs.append((name, value))
        else:
            name, value = pairs[-1]
            pairs[-1] = (name, f"{value} {text}".strip())
    return pairs


def _is_trained(run_dir: Path, made_with: dict[str, Any]) -> bool:
    """Tell whether the run is there; refuse one that other settings made."""
    path = run_dir / MADE_WITH
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not stored.get("is_done"):
        return False
    changed = [key for key, value in made_with.items() if stored.get(key) != value]
    if changed:
        raise SettingError(
            f"`methods.lar` must be trained as it was in {run_dir}, got other "
            f"{' and '.join(changed)}. Choose another `grid_dir` or label, restore the settings, "
            "or remove that folder."
        )
    return True


def check_held_out(run_dir: Path, held_out_ids: frozenset[str]) -> None:
    """Refuse a run that has learned from tasks on which it is to be tried."""
    from lar_lightning.run_folder import trajectory_path
    from lar_lightning.trajectories import read_trajectories, trajectory_files

    path = trajectory_path(run_dir, "train")
    if not trajectory_files(path):
        return
    seen = {trajectory.task_id for trajectory in read_trajectories(path)} & held_out_ids
    if seen:
        raise SettingError(
            f"`methods.lar.run_dir` must not have learned from held-out tasks, but {run_dir} has "
            f"from {len(seen)}, such as {min(seen)}. Use its `num_held_out` and `split_seed`, or "
            "fewer held-out tasks, or train another run."
        )
