import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from lar_lightning.artefacts import (
    differences,
    disk_error,
    explained_disk_errors,
    one_at_a_time,
    replacing,
    replacing_folder,
    write_json,
)
from lar_lightning.errors import SettingError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "artefact.json"
    write_json(path, {"version": 1})
    before = path.read_text()
    with pytest.raises(KeyError), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyError("interrupted")
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["artefact.json"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "export"
    for version in ("one", "two"):
        with replacing_folder(target) as temporary:
            (temporary / "model").write_text(version)
    assert (target / "model").read_text() == "two"
    with pytest.raises(KeyError), replacing_folder(target) as temporary:  # noqa: PT012
        (temporary / "model").write_text("three")
        raise KeyError("killed")
    assert (target / "model").read_text() == "two"
    assert os.listdir(tmp_path) == ["export"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_with_the_place_and_the_way_out(
    error: Exception, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="run_dir") as raised, explained_disk_errors(tmp_path):
        raise error
    assert str(tmp_path) in str(raised.value)
    assert "Free space" in str(raised.value)


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    assert disk_error(FileNotFoundError(errno.ENOENT, "no such file")) is None
    with pytest.raises(KeyError), explained_disk_errors(tmp_path):
        raise KeyError("a bug is no disk error")


def test_differences_name_each_key_with_both_values() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b: 2 -> 3"
    assert differences({"a": 1}, {"a": 1}) == ""


def test_two_processes_make_one_thing_one_after_the_other(tmp_path: Path) -> None:
    def make() -> None:
        with one_at_a_time(tmp_path / "thing"):
            log = tmp_path / "log"
            with log.open("a") as file:
                file.write("in ")
            time.sleep(0.2)
            with log.open("a") as file:
                file.write("out ")

    processes = [multiprocessing.get_context("fork").Process(target=make) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert (tmp_path / "log").read_text() == "in out in out "
