"""The last checkpoint, file or folder, is whole at any moment."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from lar_lightning.distributed.strategy import RunCheckpointIO
from lar_lightning.errors import SettingError
from lar_lightning.recovery.checkpoints import (
    META,
    newest_whole,
    next_path,
    read_checkpoint,
    remove,
    shard_name,
    take_place,
)


def write_file(path: Path, step: int) -> None:
    torch.save({"step": step}, path)


def write_folder(path: Path, step: int) -> None:
    from safetensors.torch import save_file

    path.mkdir()
    save_file({}, path / shard_name(0, 1))
    torch.save({"step": step, "num_shards": 1}, path / META)


FORMS = {"file": write_file, "folder": write_folder}


@pytest.mark.parametrize("before", FORMS)
@pytest.mark.parametrize("after", FORMS)
def test_checkpoint_of_either_form_takes_the_place_of_either(
    before: str, after: str, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    FORMS[before](path, 1)
    FORMS[after](next_path(path), 2)
    take_place(path)
    assert read_checkpoint(path)["step"] == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize("before", FORMS)
@pytest.mark.parametrize("after", FORMS)
@pytest.mark.parametrize("num_calls", [0, 1, 2, 3])
def test_process_killed_while_it_replaces_a_checkpoint_leaves_one_of_them(
    before: str, after: str, num_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after so many renames and removals; the next run saves as if nothing had been."""
    path = tmp_path / "last.ckpt"
    FORMS[before](path, 1)
    FORMS[after](next_path(path), 2)
    done = 0

    class Killed(BaseException):
        pass

    def counted(work: object) -> object:
        def call(*arguments: object) -> None:
            nonlocal done
            if done == num_calls:
                raise Killed
            done += 1
            work(*arguments)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr("lar_lightning.recovery.checkpoints.remove", counted(remove))
        with contextlib.suppress(Killed):
            take_place(path)
    assert read_checkpoint(newest_whole(path) or path)["step"] in (1, 2)
    remove(next_path(path))
    FORMS[after](next_path(path), 3)
    take_place(path)
    assert read_checkpoint(path)["step"] == 3
    assert sorted(each.name for each in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_checkpoint_that_cannot_be_written_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_file(path, 1)
    with pytest.raises(Exception, match=r"pickle|serial"):
        RunCheckpointIO().save_checkpoint({"step": lambda: 2}, path)
    assert read_checkpoint(path)["step"] == 1


def test_checkpoint_that_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"got .*none\.ckpt, which does not exist"):
        read_checkpoint(tmp_path / "none.ckpt")
