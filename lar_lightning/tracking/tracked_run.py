"""Weights & Biases: one run for all lives of a run folder, without a say in whether it goes on.

Everything that W&B is told is also in the run folder (CSV, JSON, `report.html`).
"""

import json
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from typing_extensions import override

from lar_lightning.artefacts import write_json
from lar_lightning.errors import SettingError

IDENTITY_FILE = "wandb_run.json"
"""Under which id, project and entity W&B knows the run of a folder."""
FLUSH_SECONDS = 15.0
"""Until all that W&B's process was told is on the disk."""
STEP_METRIC = "trainer/global_step"
"""What W&B draws over; its own step begins anew whenever a run goes on offline."""


class TrackedRun(WandbLogger):
    """W&B's logger, with one id for a run folder, and an end to every wait.

    Without a key it works offline and says so. Left to itself, W&B ends a run that cannot reach its
    server at the start, and may wait without end at its close. Here such a run is written to disk,
    and `wandb sync` brings it up later. A connection that is lost in between is tried again in the
    background while training goes on; where W&B's own process is lost, metrics end there, and what
    it has written stays on disk.
    """

    finish_seconds: float
    is_lost = False
    """W&B's own process has ended."""

    def __init__(
        self,
        *,
        save_dir: Path | str | None = None,
        project: str | None = None,
        entity: str | None = None,
        connect_seconds: float = 30.0,
        finish_seconds: float = 60.0,
        **options: Any,
    ) -> None:
        """Set up the logger; W&B is not told anything before the first use.

        Args:
            save_dir: Folder of the run, which keeps W&B's id; the command line sets it.
            project: In W&B; default: that of the run so far, else lar_lightning.
            entity: User or team in W&B; default: that of the run so far, else that of the key.
            connect_seconds: To wait for the server at the start, before the run is kept on disk.
            finish_seconds: To wait for what is not uploaded at the end; it stays on disk.
            options: Of Lightning's `WandbLogger`.
        """
        import wandb

        if options.get("log_model"):
            raise SettingError(
                f"`trainer.logger.log_model` must be false, got {options['log_model']!r}: a "
                "checkpoint holds what trains only, and W&B refuses it offline. The verb `track` "
                "logs the exported model."
            )
        self.finish_seconds = finish_seconds
        limits = wandb.Settings(init_timeout=connect_seconds, finish_timeout=finish_seconds)
        super().__init__(
            **options,
            save_dir=save_dir or ".",
            project=project,
            entity=entity,
            settings=limits,
        )

    @property
    @rank_zero_experiment
    @override
    def experiment(self) -> Any:
        from wandb.errors import CommError

        found: Any = WandbLogger.experiment
        if self._experiment is None:
            self._identify()
            self._choose_mode()
            try:
                return found.fget(self)
            except CommError as error:
                rank_zero_warn(
                    f"W&B cannot be reached ({str(error).splitlines()[0]}). Training goes on, and "
                    f"the run is kept in {self.save_dir}: `wandb sync` brings it up."
                )
                self._wandb_init["mode"] = "offline"
                _forget_attempt()
        return found.fget(self)

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not self.is_lost:
            with self.going_on():
                super().log_metrics(metrics, step)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Say what W&B fails at, and go on: it has no say in whether training does."""
        try:
            yield
        except ConnectionError as error:
            self.is_lost = True
            rank_zero_warn(
                f"W&B's process has ended ({error}). Training goes on without it; what it has "
                f"written is in {self.save_dir}: `wandb sync` brings it up."
            )
        except SettingError:
            raise
        except Exception as error:
            first = str(error).partition("\n")[0]
            rank_zero_warn(
                f"W&B has not taken a value ({type(error).__name__}: {first}). Training goes on; "
                f"the files in {self.save_dir} have it."
            )

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run when training ends, so that nothing waits for the process to end well."""
        super().finalize(status)
        run, self._experiment = self._experiment, None
        if run is None or self.is_lost:
            return
        with self.going_on():
            if not ended_in(
                lambda: run.finish(exit_code=0 if status == "success" else 1),
                self.finish_seconds + FLUSH_SECONDS,
            ):
                # W&B's own limit does not count for what it uploads as artefacts.
                kill_wandb()
                self.is_lost = True
                rank_zero_warn(
                    "W&B has not brought up all that it was told. It is kept in "
                    f"{self.save_dir}/wandb: `wandb sync` brings it up."
                )

    def _identify(self) -> None:
        """Take the run's identity from its folder, or leave it there."""
        path = Path(self.save_dir or ".") / IDENTITY_FILE
        known = read_identity(path.parent)
        identity = {
            "id": self._wandb_init.get("id") or known.get("id") or secrets.token_hex(4),
            "project": self._given("project") or known.get("project") or "lar_lightning",
            "entity": self._given("entity") or known.get("entity"),
        }
        if identity != known:
            write_json(path, identity)
        # Lightning hands over what was not set as None, and None would begin a run anew.
        self._wandb_init |= {**identity, "resume": "allow"}
        self._id, self._project = identity["id"], identity["project"]

    def _given(self, name: Literal["project", "entity"]) -> str | None:
        value = self._wandb_init.get(name)
        return None if value == "lightning_logs" else value  # Lightning's default

    def _choose_mode(self) -> None:
        if self._offline:
            self._wandb_init["mode"] = "offline"
        is_chosen = self._wandb_init.get("mode") or os.environ.get("WANDB_MODE")
        if not is_chosen and not has_key():
            rank_zero_info(
                "W&B: offline, since there is no key (WANDB_API_KEY or `wandb login`). The run is "
                f"kept in {self.save_dir}/wandb; `wandb sync` brings it up."
            )
            self._wandb_init["mode"] = "offline"


def ended_in(action: Callable[[], object], seconds: float) -> bool:
    """Call in a thread that nothing waits for at the end; return whether it ended in time.

    Raises:
        Exception: what the action raises.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    return not thread.is_alive()


def kill_wandb() -> None:
    """End W&B's process at once; else it would be waited for when this one ends."""
    import psutil

    for child in psutil.Process().children():
        if child.name() == "wandb-core":
            child.kill()
            child.wait()


def _forget_attempt() -> None:
    """End W&B's process, which holds the id of a run that it could not begin."""
    import wandb

    with suppress(SystemExit, Exception):  # it ends the process where its own did not end well
        wandb.teardown()


def read_identity(run_dir: Path) -> dict[str, Any]:
    """Return W&B's id, project and entity of a run folder; empty where it was never tracked.

    Raises:
        SettingError: if the file is torn.
    """
    path = Path(run_dir) / IDENTITY_FILE
    if not path.exists():
        return {}
    try:
        return {"id": None, **json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise SettingError(
            f"`run_dir` must hold W&B's identity as JSON in {path}, got something else ({error}). "
            "Remove it to begin a new run in W&B."
        ) from error


def has_key() -> bool:
    """Whether W&B could log in: by the environment or by what `wandb login` has left."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth  # it knows under which names a server goes in a netrc file

    settings = wandb.setup().settings
    try:
        return bool(settings.api_key or wbauth.read_netrc_auth(host=settings.base_url))
    except AuthenticationError:
        return True  # W&B itself says what is wrong with the key


def tell(loggers: Iterable[Logger], what: Callable[[Any], object]) -> None:
    """Call with each W&B run of a trainer's loggers; where W&B fails, training goes on."""
    for logger in loggers:
        if isinstance(logger, TrackedRun):
            if not logger.is_lost:
                with logger.going_on():
                    what(logger.experiment)
        elif isinstance(logger, WandbLogger):
            what(logger.experiment)


def alert(
    loggers: Iterable[Logger],
    title: str,
    text: str,
    level: Literal["INFO", "WARN", "ERROR"] = "WARN",
) -> None:
    """Send an alert through every W&B logger; a run without W&B has it in its own files.

    Args:
        loggers: Of the trainer.
        title: Short; W&B sends one alert of a title a minute.
        text: What was found, at which step, and what is done about it.
        level: How bad it is.
    """
    tell(loggers, lambda run: run.alert(title=title, text=text, level=level))
