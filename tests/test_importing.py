"""Recordings become a run's trajectories, once."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import tiny_recording

from lar_lightning.__main__ import main
from lar_lightning.errors import SettingError
from lar_lightning.models import scoring
from lar_lightning.recordings.importing import held_out_tasks, import_recordings, read_recorded
from lar_lightning.settings import RecordingSettings
from lar_lightning.trajectories import Trajectory, read_settings, read_trajectories


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    return tiny_recording(tmp_path / "recording.jsonl")


def settings_of(recording: Path, **options: Any) -> RecordingSettings:
    return RecordingSettings(**{"paths": (str(recording),), "entropy": "none", **options})


def both_splits(run_dir: Path) -> list[Trajectory]:
    return [*read_recorded(run_dir, "train"), *read_recorded(run_dir, "held_out")]


def test_tasks_are_split_and_their_episodes_stay_together(
    recording: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    import_recordings(tiny_checkpoint, tmp_path, settings_of(recording, num_held_out=0.2))
    training, held_out = (read_recorded(tmp_path, split) for split in ("train", "held_out"))
    assert (len(training), len(held_out)) == (32, 8)
    assert not {t.task_id for t in training} & {t.task_id for t in held_out}
    assert {t.entropy_kind for t in training} == {"none"}
    assert all(t.temperature is None and np.isnan(t.entropies).all() for t in training)


def test_split_depends_on_the_seed_and_not_on_the_order() -> None:
    task_ids = [f"t{i}" for i in range(50)]
    settings = RecordingSettings(paths=("x",), num_held_out=10)
    drawn = held_out_tasks(task_ids, settings)
    assert len(drawn) == 10
    assert drawn == held_out_tasks(task_ids[::-1], settings)
    other = RecordingSettings(paths=("x",), num_held_out=10, split_seed=1)
    assert drawn != held_out_tasks(task_ids, other)


def test_a_second_import_reuses_and_others_are_refused(
    recording: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import_recordings(tiny_checkpoint, tmp_path, settings_of(recording))
    before = (tmp_path / "trajectories" / "train.jsonl").read_bytes()
    capsys.readouterr()
    import_recordings(tiny_checkpoint, tmp_path, settings_of(recording, is_strict=True))
    assert "recordings: reused" in capsys.readouterr().out
    assert (tmp_path / "trajectories" / "train.jsonl").read_bytes() == before
    with pytest.raises(SettingError, match=r"num_held_out: 0\.1 -> 0\.5"):
        import_recordings(tiny_checkpoint, tmp_path, settings_of(recording, num_held_out=0.5))
    tiny_recording(recording, num_tasks=21)
    with pytest.raises(SettingError, match="recordings: '"):
        import_recordings(tiny_checkpoint, tmp_path, settings_of(recording))


def test_a_killed_teacher_pass_goes_on_where_it_stopped(
    recording: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(recording, entropy="exact", tokens_per_batch=200)
    import_recordings(tiny_checkpoint, tmp_path / "whole", settings)
    batches: list[int] = []
    entropies_of = scoring.entropies_of

    def counted(model: Any, batch: Any) -> Any:
        if len(batches) == 4:
            raise KeyboardInterrupt
        batches.append(len(batch))
        return entropies_of(model, batch)

    monkeypatch.setattr(scoring, "entropies_of", counted)
    with pytest.raises(KeyboardInterrupt):
        import_recordings(tiny_checkpoint, tmp_path / "killed", settings)
    num_done = sum(batches)
    assert 0 < num_done < 40
    batches[:] = [0, 0, 0, 0, 0]  # no longer stopped
    import_recordings(tiny_checkpoint, tmp_path / "killed", settings)
    assert sum(batches) == 40 - num_done
    whole, killed = both_splits(tmp_path / "whole"), both_splits(tmp_path / "killed")
    assert [t.trajectory_id for t in whole] == [t.trajectory_id for t in killed]
    for left, right in zip(whole, killed, strict=True):
        assert left.entropy_kind == right.entropy_kind == "exact"
        np.testing.assert_allclose(left.entropies, right.entropies, atol=0.05)  # bf16, other batch
    assert read_settings(tmp_path / "whole" / "trajectories" / "train.jsonl")["model"]


def test_long_episodes_are_cut_behind_an_action_or_left_out(
    recording: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    import_recordings(tiny_checkpoint, tmp_path / "whole", settings_of(recording))
    whole = both_splits(tmp_path / "whole")
    first_ends = [t.action_spans[0].end for t in whole]
    limit = max(first_ends)
    assert limit < min(len(t.token_ids) for t in whole)
    cut = settings_of(recording, max_model_len=limit)
    import_recordings(tiny_checkpoint, tmp_path / "cut", cut)
    ends = [len(t.token_ids) for t in both_splits(tmp_path / "cut")]
    assert ends == first_ends
    report = json.loads((tmp_path / "cut" / "trajectories" / "import.json").read_text())
    assert report["counts"]["truncated"] == 40
    skipped = settings_of(recording, max_model_len=limit, too_long="skip")
    with pytest.raises(SettingError, match=r"`recordings.max_model_len` .*the shortest needs \d+"):
        import_recordings(tiny_checkpoint, tmp_path / "skipped", skipped)
    assert not (tmp_path / "skipped" / "trajectories").exists()


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"max_model_len": 5}, r"`recordings.max_model_len` must hold an episode, got 5"),
        ({"num_held_out": 20}, "`num_held_out` must be between 1 and 19"),
        ({"format": "sharegpt", "is_strict": True}, "`recordings.paths` must hold readable"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    options: dict[str, Any], rule: str, recording: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=rule):
        import_recordings(tiny_checkpoint, tmp_path / "run", settings_of(recording, **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"paths": ()}, "paths"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"num_held_out": 0}, "num_held_out"),
        ({"num_held_out": 2.5}, "num_held_out"),
    ],
)
def test_settings_outside_their_rules_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=f"`recordings.{field}` must"):
        RecordingSettings(**{"paths": ("x",), **options})


def test_episodes_without_actions_alone_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    records = [{"messages": [{"role": "user", "content": f"{i}?"}]} for i in range(4)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(SettingError, match=r"with actions of an assistant, got none among 4"):
        import_recordings(tiny_checkpoint, tmp_path / "run", settings_of(path))


def test_entropies_that_are_missing_in_a_scored_trajectory_are_refused(
    recording: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    import_recordings(tiny_checkpoint, tmp_path, settings_of(recording))
    file = tmp_path / "trajectories" / "train.jsonl"
    lines = file.read_text().splitlines()
    record = json.loads(lines[1])
    num_tokens = [end - start for role, start, end in record["spans"] if role == "assistant"]
    record |= {"entropy_kind": "exact", "entropies": [[float("nan")] * n for n in num_tokens]}
    file.write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]) + "\n")
    with pytest.raises(SettingError, match=r"line 2 \(entropies must be numbers .*got NaN"):
        read_trajectories(file)


def test_tokens_of_another_model_are_refused_before_mining(
    recording: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import_recordings(tiny_checkpoint, tmp_path, settings_of(recording))
    file = tmp_path / "trajectories" / "train.jsonl"
    lines = file.read_text().splitlines()
    record = json.loads(lines[1])
    record["token_ids"][3] = 49_000
    file.write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]) + "\n")
    arguments = [f"--base_model={tiny_checkpoint}", f"--run_dir={tmp_path}"]
    options = [f"--recordings={{paths: [{recording}], entropy: none}}"]
    assert main(["mine", *arguments, *options]) == 2
    assert "got token 49000" in capsys.readouterr().err


def test_verbs_import_and_mine_the_same_file(
    recording: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"base_model: {tiny_checkpoint}\nrun_dir: {tmp_path / 'run'}\n"
        f"data:\n  init_args:\n    recordings: {{paths: [{recording}], entropy: none}}\n"
        "    mining: {min_support: 4, max_latents: 8}\n"
    )
    assert main(["import", "--config", str(config)]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["mine", "--config", str(config)]) == 0
    output = capsys.readouterr().out
    assert "recordings: reused" in output
    assert "entropy: none" in output
    assert (tmp_path / "run" / "latent_vocabulary.json").exists()


def test_strict_refuses_a_torn_line_on_the_command_line(
    recording: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with recording.open("a") as file:
        file.write('{"messages": [{"role"')
    place = [f"--base_model={tiny_checkpoint}", f"--run_dir={tmp_path / 'run'}"]
    options = [f"--recordings.paths=[{recording}]", "--recordings.entropy=none"]
    assert main(["import", *place, *options, "--strict"]) == 2
    assert "line 41" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="line 41"):
        assert main(["import", *place, *options]) == 0
