"""What an offline run of Weights & Biases has left on disk, read without W&B's own tools."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768


@dataclass
class Life:
    """One process of a run: what it told W&B."""

    folder: Path
    run_id: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artefacts: dict[str, Any] = field(default_factory=dict)
    """Name -> record; the last of a name."""
    alerts: list[Any] = field(default_factory=list)
    is_over: bool = False

    def media(self, key: str) -> Path:
        """Return the file of a table or page that the summary points to."""
        return self.folder / "files" / self.summary[f"{key}.path"]

    def table(self, key: str) -> dict[str, Any]:
        return json.loads(self.media(key).read_text())


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a `.wandb` file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    parse = vars(wandb_internal_pb2)["Record"].FromString
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if left < 7 or not kind:
            place += left
            continue
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4) and place <= len(data):  # whole, or the last part
            yield parse(record)
            record = b""


def read_life(folder: Path) -> Life:
    (path,) = folder.glob("run-*.wandb")
    life = Life(folder=folder)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            life.run_id, life.project = record.run.run_id, record.run.project
            life.config |= changes(record.run.config.update)
        elif kind == "config":
            life.config |= changes(record.config.update)
        elif kind == "history":
            life.history.append(changes(record.history.item))
        elif kind == "summary":
            life.summary |= changes(record.summary.update)
        elif kind == "artifact":
            life.artefacts[record.artifact.name] = record.artifact
        elif kind == "alert":
            life.alerts.append(record.alert)
        elif kind == "exit":
            life.is_over = True
    return life


def changes(items: Any) -> dict[str, Any]:
    names = (".".join(item.nested_key) or item.key for item in items)
    return {name: json.loads(item.value_json) for name, item in zip(names, items, strict=True)}


def lives_of(run_dir: Path) -> list[Life]:
    """Return the lives of a run folder, by their beginning; the last one ends by itself."""
    end = time.monotonic() + 60
    while True:
        lives = [read_life(folder) for folder in sorted(run_dir.glob("wandb/offline-run-*"))]
        if lives[-1].is_over or time.monotonic() > end:
            return lives
        time.sleep(0.1)  # W&B's process still writes when its run has finished


def curves_of(lives: list[Life]) -> dict[str, dict[int, float]]:
    """Merge the lives over training steps: a later one replaces what it repeats."""
    curves: dict[str, dict[int, float]] = {}
    for life in lives:
        for row in life.history:
            for name, value in row.items():
                if "/" in name and isinstance(value, int | float) and "trainer/global_step" in row:
                    curves.setdefault(name, {})[row["trainer/global_step"]] = value
    return curves
