import json
import os
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_language import trajectory_of

from lar_lightning.artefacts import explained_disk_errors, write_json
from lar_lightning.errors import SettingError
from lar_lightning.trajectories import (
    ACTION,
    Span,
    Trajectory,
    TrajectoryFile,
    from_record,
    read_trajectories,
    summary_of,
    to_record,
)

SETTINGS = {"model_fingerprint": "f00d", "max_tokens": 16}


def assert_equal(left: Trajectory, right: Trajectory) -> None:
    assert to_record(left) == to_record(right)
    assert left.token_ids.tolist() == right.token_ids.tolist()
    assert left.spans == right.spans
    np.testing.assert_allclose(left.entropies, right.entropies, atol=5.1e-5)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    ends = np.cumsum(lengths).tolist()
    roles = [draw(st.sampled_from(["system", "user", "tool", ACTION])) for _ in lengths]
    spans = tuple(
        Span(role=role, start=start, end=end)
        for role, start, end in zip(roles, [0, *ends], ends, strict=False)
    )
    entropies = np.full(ends[-1], np.nan, dtype=np.float32)
    for span in spans:
        if span.role == ACTION:
            size = span.end - span.start
            values = draw(st.lists(st.floats(0, 12, width=32), min_size=size, max_size=size))
            entropies[span.start : span.end] = values
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=ends[-1], max_size=ends[-1]))
    return Trajectory(
        trajectory_id=draw(st.text()),
        task_id=draw(st.text()),
        token_ids=np.asarray(ids, dtype=np.int32),
        spans=spans,
        entropies=entropies,
        entropy_kind=draw(st.sampled_from(["exact", "upper bound from top-20"])),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.0])),
        is_finished=draw(st.booleans()),
    )


@given(trajectory=trajectories())
def test_record_survives_json(trajectory: Trajectory) -> None:
    record = json.loads(json.dumps(to_record(trajectory), ensure_ascii=False))
    assert_equal(from_record(record), trajectory)


def test_horizon_counts_action_tokens_only() -> None:
    trajectory = trajectory_of("abcd")
    assert len(trajectory.token_ids) == 5
    assert trajectory.horizon == 4
    assert [span.role for span in trajectory.action_spans] == [ACTION]


@pytest.mark.parametrize(
    "spans",
    [
        (),
        (Span(role="user", start=0, end=2),),
        (Span(role="user", start=1, end=3),),
        (Span(role="user", start=0, end=1), Span(role=ACTION, start=2, end=3)),
        (Span(role="user", start=0, end=2), Span(role=ACTION, start=1, end=3)),
    ],
)
def test_spans_must_cover_all_tokens(spans: tuple[Span, ...]) -> None:
    with pytest.raises(ValueError, match="must cover its 3 tokens"):
        replace(trajectory_of("ad"), spans=spans)


def test_entropies_must_be_one_a_token() -> None:
    with pytest.raises(ValueError, match="must be one a token, got 2"):
        replace(trajectory_of("ad"), entropies=np.zeros(2, dtype=np.float32))


def test_summary_counts_tasks_once() -> None:
    trajectory = trajectory_of("abd")
    summary = summary_of([trajectory, replace(trajectory, trajectory_id="again")])
    assert summary == "2 trajectories of 1 tasks, 6 action tokens, entropy: exact"


@pytest.fixture
def file(tmp_path: Path) -> TrajectoryFile:
    return TrajectoryFile(tmp_path / "trajectories" / "train.jsonl", SETTINGS)


def ids_in(path: Path) -> list[str]:
    return [trajectory.trajectory_id for trajectory in read_trajectories(path)]


def test_appended_trajectories_are_read_in_order(file: TrajectoryFile) -> None:
    appended = [trajectory_of(text) for text in ("abd", "cd", "bd")]
    for trajectory in appended:
        file.append(trajectory)
    for found, expected in zip(file.read(), appended, strict=True):
        assert to_record(found) == to_record(expected)


def test_reopened_file_goes_on(file: TrajectoryFile) -> None:
    file.append(trajectory_of("abd"))
    TrajectoryFile(file.path, SETTINGS).append(trajectory_of("cd"))
    assert ids_in(file.path) == ["abd", "cd"]


def test_torn_last_line_is_left_out_and_repaired_on_reopening(file: TrajectoryFile) -> None:
    file.append(trajectory_of("abd"))
    whole = file.path.read_bytes()
    file.append(trajectory_of("cd"))
    torn = file.path.read_bytes()
    file.path.write_bytes(torn[: (len(whole) + len(torn)) // 2])
    with pytest.warns(UserWarning, match="last line is torn"):
        assert ids_in(file.path) == ["abd"]
    with pytest.warns(UserWarning, match="dropped a torn last line"):
        reopened = TrajectoryFile(file.path, SETTINGS)
    assert file.path.read_bytes() == whole
    reopened.append(trajectory_of("bd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids_in(file.path) == ["abd", "bd"]


def test_line_that_only_lacks_its_end_counts_as_torn(file: TrajectoryFile) -> None:
    """Else the next record would be written behind it, on the same line."""
    file.append(trajectory_of("abd"))
    file.append(trajectory_of("cd"))
    file.path.write_bytes(file.path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="dropped a torn last line"):
        TrajectoryFile(file.path, SETTINGS).append(trajectory_of("bd"))
    assert ids_in(file.path) == ["abd", "bd"]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"trajectory_id": "a"}',
        b'{"trajectory_id": "a", "token_ids": [99999999999], "spans": [], "entropies": []}',
    ],
)
def test_corrupt_middle_line_is_named(file: TrajectoryFile, line: bytes) -> None:
    file.append(trajectory_of("abd"))
    with file.path.open("ab") as stream:
        stream.write(line + b"\n")
    file.append(trajectory_of("cd"))
    with pytest.raises(SettingError, match=f"{file.path}.*in line 3.*Remove that line"):
        read_trajectories(file.path)


@pytest.mark.parametrize("field", list(to_record(trajectory_of("abd"))))
def test_record_without_a_field_is_corrupt(file: TrajectoryFile, field: str) -> None:
    record = to_record(trajectory_of("abd"))
    del record[field]
    with file.path.open("a") as stream:
        stream.write(json.dumps(record) + "\n")
    with pytest.raises(SettingError, match="in line 2"):
        read_trajectories(file.path)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "\n",
        "task,answer\n",
        "[1]\n",
        '{"a": 1}\n',
        '{"schema": 1, "settings": "none"}\n',
        '{"schema": 1, "settings": {"model_fingerprint": "f00d", "max_tokens": 16}}',
    ],
)
def test_file_without_a_header_is_neither_read_nor_opened(tmp_path: Path, header: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(header)
    for open_or_read in (read_trajectories, lambda path: TrajectoryFile(path, SETTINGS)):
        with pytest.raises(SettingError, match=f"{path} must be a trajectory file.*Remove it"):
            open_or_read(path)
    assert path.read_text() == header


def test_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"schema": 99, "settings": {}}\n')
    with pytest.raises(SettingError, match=f"{path} must have schema 1, got 99.*Roll out anew"):
        TrajectoryFile(path, SETTINGS)


def test_file_of_other_settings_is_refused_and_kept(file: TrajectoryFile) -> None:
    file.append(trajectory_of("abd"))
    content = file.path.read_bytes()
    with pytest.raises(SettingError, match=r"max_tokens: 16 -> 32.*Choose another `run_dir`"):
        TrajectoryFile(file.path, {**SETTINGS, "max_tokens": 32})
    assert file.path.read_bytes() == content


@pytest.mark.parametrize("is_made", [False, True])
def test_missing_rollouts_name_the_verb_that_makes_them(tmp_path: Path, is_made: bool) -> None:
    path = tmp_path / "train.jsonl"
    if is_made:
        TrajectoryFile(path, SETTINGS)
    with pytest.raises(SettingError, match=f"{path}.*Run the verb `rollout`"):
        read_trajectories(path)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let the kernel cut every write at `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_record_that_is_cut_while_writing_leaves_the_file_as_it_was(file: TrajectoryFile) -> None:
    file.append(trajectory_of("abd"))
    content = file.path.read_bytes()
    with (
        file_size_limit(len(content) + 10),
        pytest.raises(SettingError, match=f"{file.path} .*No space left.*Free space"),
    ):
        file.append(trajectory_of("cd"))
    assert file.path.read_bytes() == content
    file.append(trajectory_of("cd"))
    assert ids_in(file.path) == ["abd", "cd"]


needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")


@needs_dev_full
def test_full_disk_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with (
        pytest.raises(SettingError, match=f"{path}.*No space left.*Free space or choose another"),
        explained_disk_errors(path),
        open("/dev/full", "wb", buffering=0) as device,
    ):
        device.write(b"x")


@needs_dev_full
def test_file_keeps_its_content_where_its_replacement_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vocabulary.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, "getpid", lambda: 7)
    (tmp_path / ".vocabulary.json.7.tmp").symlink_to("/dev/full")
    with pytest.raises(SettingError, match=f"{path}.*No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["vocabulary.json"]


def test_other_disk_errors_are_not_explained_away(file: TrajectoryFile) -> None:
    file.path.unlink()
    with pytest.raises(FileNotFoundError):
        file.append(trajectory_of("abd"))
