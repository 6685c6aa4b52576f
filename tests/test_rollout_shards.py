"""Rollouts that several processes share, as SLURM arrays do: nothing is lost or made twice."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lar_lightning.__main__ import main
from lar_lightning.errors import SettingError
from lar_lightning.rollouts.roll_out import read_split
from lar_lightning.rollouts.shards import WHOLE, Shard, chosen_shard, writing
from lar_lightning.settings import RolloutSettings
from lar_lightning.trajectories import trajectory_files

ROOT = Path(__file__).parents[1]
NUM_TRAINING, NUM_HELD_OUT = 7, 3
SETTINGS = RolloutSettings(temperatures=(0.0, 1.0), held_out_temperatures=(1.0,))


def arguments(checkpoint: Path, run_dir: Path, *options: str) -> list[str]:
    return [
        "rollout",
        f"--base_model={checkpoint}",
        f"--run_dir={run_dir}",
        "--benchmark=humaneval",
        "--rollouts.engine=transformers",
        f"--rollouts.num_training={NUM_TRAINING}",
        f"--rollouts.num_held_out={NUM_HELD_OUT}",
        "--rollouts.temperatures=[0.0, 1.0]",
        "--rollouts.held_out_temperatures=[1.0]",
        "--rollouts.max_tokens=4",
        "--rollouts.num_concurrent=1",  # alone in its batch, an episode is the same in every run
        *options,
    ]


def array_task(task: int, first: int, last: int, step: int, count: int) -> dict[str, str]:
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    values = (task, first, last, step, count)
    pairs = zip(names, values, strict=True)
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in pairs}


@pytest.fixture(scope="module")
def made_by_an_array(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `sbatch --array=3,5` of one command leaves, its two tasks at once; copy before use."""
    run_dir = tmp_path_factory.mktemp("array")
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "lar_lightning", *arguments(tiny_checkpoint, run_dir)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **array_task(task, 3, 5, 2, 2)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in (3, 5)
    ]
    said = [task.communicate()[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert "rollouts (train, shard 0/2): 0 reused" in said[0]
    assert "rollouts (train, shard 1/2): 0 reused" in said[1]
    return run_dir


@pytest.fixture
def run_dir(made_by_an_array: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_by_an_array, tmp_path / "run"))


def files_of(run_dir: Path) -> list[str]:
    return sorted(file.name for file in (run_dir / "trajectories").glob("*.jsonl"))


def names_in(run_dir: Path, split: str) -> Counter[str]:
    """Count each episode in all files of a split."""
    files = trajectory_files(run_dir / "trajectories" / f"{split}.jsonl")
    lines = [line for file in files for line in file.read_text().splitlines()[1:]]
    return Counter(json.loads(line)["trajectory_id"] for line in lines)


def content_of(run_dir: Path) -> dict[str, list[int]]:
    return {
        trajectory.trajectory_id: trajectory.token_ids.tolist()
        for split in ("train", "held_out")
        for trajectory in read_split(run_dir, split, SETTINGS)
    }


def test_array_tasks_make_together_what_one_process_makes(
    made_by_an_array: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert files_of(made_by_an_array) == [
        f"{split}.shard-{index}-of-2.jsonl" for split in ("held_out", "train") for index in (0, 1)
    ]
    assert set(names_in(made_by_an_array, "train").values()) == {1}
    assert main(arguments(tiny_checkpoint, tmp_path)) == 0
    assert len(content_of(tmp_path)) == 2 * NUM_TRAINING + NUM_HELD_OUT
    assert content_of(made_by_an_array) == content_of(tmp_path)


def test_other_numbers_of_shards_and_more_tasks_go_on_with_what_is_there(
    run_dir: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    before = content_of(run_dir)
    more = ("--rollouts.num_training=12", "--rollouts.temperatures=[0.0]")
    for index in range(3):
        assert main(arguments(tiny_checkpoint, run_dir, *more, f"--shard={index}/3")) == 0
    said = capsys.readouterr().out
    assert [said.count(f"{number} to make") for number in (1, 2)] == [1, 2]  # five tasks, greedy
    assert main(arguments(tiny_checkpoint, run_dir, *more)) == 0
    assert "12 reused" in capsys.readouterr().out
    names = names_in(run_dir, "train")
    assert len(names) == 2 * NUM_TRAINING + 5
    assert set(names.values()) == {1}
    assert before.items() <= content_of(run_dir).items()
    assert "train.jsonl" not in files_of(run_dir)


def test_a_torn_line_of_a_shard_costs_its_own_episode(
    run_dir: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    before = content_of(run_dir)
    file = run_dir / "trajectories" / "train.shard-1-of-2.jsonl"
    os.truncate(file, file.stat().st_size - 9)
    with pytest.warns(UserWarning, match=r"train\.shard-1-of-2\.jsonl: dropped a torn last line"):
        assert main(arguments(tiny_checkpoint, run_dir)) == 0
    assert "1 to make" in capsys.readouterr().out
    assert content_of(run_dir) == before
    assert set(names_in(run_dir, "train").values()) == {1}


def spoil_line(file: Path) -> str:
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], lines[2][:30], *lines[3:]]) + "\n")
    return "in line 3"


def spoil_header(file: Path) -> str:
    file.write_text("\0" * 100 + file.read_text())
    return "whose first line is its header"


def make_unreadable(file: Path) -> str:
    file.unlink()
    file.mkdir()  # root may read whatever its rights
    return "must be readable, got Is a directory"


@pytest.mark.parametrize("spoil", [spoil_line, spoil_header, make_unreadable])
@pytest.mark.parametrize("verb", ["rollout", "mine"])
def test_a_corrupt_shard_is_named_and_moved_away_costs_only_its_own_episodes(
    spoil, verb: str, run_dir: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    before = content_of(run_dir)
    file = run_dir / "trajectories" / "train.shard-0-of-2.jsonl"
    words = spoil(file)
    mining = ["mine", f"--base_model={tiny_checkpoint}", f"--run_dir={run_dir}"]
    rolling = arguments(tiny_checkpoint, run_dir)
    assert main(mining if verb == "mine" else rolling) == 2
    said = capsys.readouterr().err
    assert str(file) in said
    assert words in said
    if verb == "rollout":
        file.rename(file.with_suffix(".aside"))
        assert main(rolling) == 0
        assert "6 reused" in capsys.readouterr().out
        assert content_of(run_dir) == before


def test_shards_of_other_settings_are_refused(
    run_dir: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    other = arguments(tiny_checkpoint, run_dir, "--rollouts.max_tokens=5", "--shard=2/3")
    assert main(other) == 2
    assert "train.shard-0-of-2.jsonl was made with others (max_tokens: 4 -> 5)" in (
        capsys.readouterr().err
    )
    assert len(files_of(run_dir)) == 4
    file = run_dir / "trajectories" / "train.shard-1-of-2.jsonl"
    file.write_text(file.read_text().replace('"max_tokens": 4', '"max_tokens": 5'))
    with pytest.raises(SettingError, match=r"train\.shard-1-of-2\.jsonl was made with others"):
        read_split(run_dir, "train", SETTINGS)


HOLDER = """\
import sys
from pathlib import Path
from lar_lightning.rollouts.shards import Shard, writing
with writing(Path(sys.argv[1]), Shard(index=1, count=4)):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process at work on the second of four shards."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_shard_has_one_process_and_a_killed_one_leaves_it(
    holder: subprocess.Popen, tmp_path: Path
) -> None:
    for index in (0, 2, 3):
        with writing(tmp_path, Shard(index=index, count=4)):
            pass
    with (
        pytest.raises(SettingError, match="another one is at work on shard 1/4"),
        writing(tmp_path, Shard(index=1, count=4)),
    ):
        pass
    for other in (WHOLE, Shard(index=0, count=2), Shard(index=6, count=7)):
        with (
            pytest.raises(SettingError, match="at work with another number of shards"),
            writing(tmp_path, other),
        ):
            pass
    holder.kill()
    holder.wait()
    for shard in (Shard(index=1, count=4), WHOLE):
        with writing(tmp_path, shard):
            pass


@given(num_items=st.integers(0, 50), more=st.integers(0, 20), count=st.integers(1, 12))
def test_shards_part_the_tasks_evenly_and_more_tasks_move_none(
    num_items: int, more: int, count: int
) -> None:
    shards = [Shard(index=index, count=count) for index in range(count)]
    parts = [list(shard.part_of(range(num_items))) for shard in shards]
    assert sorted(item for part in parts for item in part) == list(range(num_items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for shard, part in zip(shards, parts, strict=True):
        assert list(shard.part_of(range(num_items + more)))[: len(part)] == part


@given(first=st.integers(0, 9), step=st.integers(1, 5), count=st.integers(1, 9), place=st.data())
def test_array_tasks_know_their_place(
    first: int, step: int, count: int, place: st.DataObject
) -> None:
    index = place.draw(st.integers(0, count - 1))
    last = first + (count - 1) * step
    environment = array_task(first + index * step, first, last, step, count)
    assert chosen_shard("auto", environment) == Shard(index=index, count=count)
    assert chosen_shard("all", environment) == WHOLE
    assert chosen_shard("2/3", environment) == Shard(index=2, count=3)


def test_without_an_array_all_is_one_shard() -> None:
    assert chosen_shard("auto", {"SLURM_JOB_ID": "7"}) == WHOLE


@pytest.mark.parametrize("text", ["3/3", "-1/3", "1", "0/0", "1/2/3", "0/9999999"])
def test_shards_that_there_are_not_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="`--shard` must be auto, all or INDEX/COUNT"):
        chosen_shard(text, {})


@pytest.mark.parametrize("task", [1, 2, 7])
def test_uneven_arrays_are_refused_by_all_of_their_tasks(task: int) -> None:
    with pytest.raises(SettingError, match=r"needs an array of even steps.*ID '\d'"):
        chosen_shard("auto", array_task(task, 1, 7, 1, 3))
