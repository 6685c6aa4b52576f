"""Estimates against measured steps: bytes by the allocator's own count, operations by torch's."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lar_lightning.__main__ import main
from lar_lightning.errors import SettingError
from lar_lightning.estimates.backbones import PRESETS, Backbone, backbone_of
from lar_lightning.estimates.machines import H200
from lar_lightning.estimates.memory import memory_of
from lar_lightning.estimates.speed import flops_of, speed_of
from lar_lightning.estimates.table import fits, ways_out
from lar_lightning.estimates.workload import Workload
from tests.benchmarks.meter import FlopCounter
from tests.measured_steps import SmallStep, measured_bytes

SMALL = Backbone(
    name="small",
    num_layers=6,
    hidden_size=256,
    feed_forward_size=768,
    num_heads=4,
    num_key_heads=2,
    head_size=64,
    vocabulary_size=8000,
)
TIED = replace(
    SMALL, num_layers=4, hidden_size=384, num_heads=6, vocabulary_size=16_000, is_tied=True
)
NORMED = replace(SMALL, hidden_size=320, has_head_norms=True)
CASES = [
    *((SMALL, name, {"num_tokens": n}) for name in ("rows", "lora", "full") for n in (512, 1024)),
    *((TIED, name, {"num_tokens": 700, "rows_per_chunk": 8}) for name in ("rows", "lora", "full")),
    *((NORMED, name, {"num_tokens": 640, "batch_size": 2}) for name in ("lora", "full")),
    *((SMALL, name, {"num_tokens": 800, "is_checkpointed": True}) for name in ("rows", "full")),
    # A prompt without latents, which `rows` reads by itself and then attends to under a mask.
    *((SMALL, name, {"num_tokens": 1200, "num_plain": 400}) for name in ("rows", "lora")),
]
TOLERANCE = 0.15


@pytest.mark.parametrize(("backbone", "trainable", "options"), CASES)
def test_memory_and_operations_of_a_step_are_within_15_percent_of_what_is_measured(
    backbone: Backbone, trainable: str, options: dict[str, int]
) -> None:
    step = SmallStep(backbone, trainable=trainable, **options)  # type: ignore[arg-type]
    work = step.workload
    memory = memory_of(backbone, work)
    measured = measured_bytes(step)
    assert memory.weights + memory.teacher == pytest.approx(step.fixed_bytes, rel=0.02)
    assert memory.peak == pytest.approx(max(measured.values()), rel=TOLERANCE)
    # The largest moment must be right for the right reason.
    for moment in ("forward", "optimizer"):
        assert memory.moments[moment] == pytest.approx(measured[moment], rel=TOLERANCE), moment
    with FlopCounter() as counter:
        step.run()
    assert flops_of(backbone, work) == pytest.approx(counter.total, rel=0.05)


def test_presets_have_the_parameters_that_their_makers_state() -> None:
    counts = {name: backbone.num_parameters for name, backbone in PRESETS.items()}
    assert counts == {
        "qwen3-8b": 8_190_735_360,
        "llama-3.1-8b": 8_030_261_248,
        "qwen3-32b": 32_762_123_264,
        "llama-3.1-70b": 70_553_706_496,
    }


def test_a_checkpoint_folder_is_read(tiny_checkpoint: Path) -> None:
    from safetensors import safe_open

    with safe_open(tiny_checkpoint / "model.safetensors", "pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert backbone_of(str(tiny_checkpoint)).num_parameters == count


def test_models_that_estimates_do_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="Did you mean 'qwen3-8b'"):
        backbone_of("qwen3-9b")
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 8, "hidden_size": 4}))
    with pytest.raises(SettingError, match="which has experts"):
        backbone_of(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 8}))
    with pytest.raises(SettingError, match="has no 'num_hidden_layers'"):
        backbone_of(str(tmp_path))


@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
def test_more_shards_and_checkpointing_never_take_more_memory(trainable: str) -> None:
    for backbone in PRESETS.values():
        work = Workload(trainable=trainable)  # type: ignore[arg-type]
        peaks = [memory_of(backbone, replace(work, num_shards=n)).peak for n in (8, 16, 64)]
        assert peaks == sorted(peaks, reverse=True)
        again = memory_of(backbone, replace(work, num_shards=8, is_checkpointed=True))
        assert again.peak < peaks[0]


def test_ways_out_of_what_does_not_fit_do_fit() -> None:
    backbone, work = PRESETS["qwen3-32b"], Workload(trainable="full")
    assert not fits(memory_of(backbone, work), H200)
    ways = list(ways_out(backbone, work, H200))
    assert ways[0].startswith("shard over ")
    assert any(way.startswith("train rows") for way in ways)
    assert fits(memory_of(backbone, replace(work, num_shards=64)), H200)


def test_time_is_bound_by_the_slower_of_products_and_transfers() -> None:
    backbone, work = PRESETS["llama-3.1-70b"], Workload(trainable="full", num_shards=64)
    long = speed_of(backbone, work, H200, num_devices=64)
    short = speed_of(
        backbone, replace(work, num_tokens=64, num_prompt_tokens=16), H200, num_devices=64
    )
    assert long.compute_seconds > long.transfer_seconds
    assert short.transfer_seconds > short.compute_seconds
    assert short.transfer_seconds == long.transfer_seconds
    assert speed_of(backbone, replace(work, num_shards=1), H200).transfer_seconds == 0


def test_table_says_what_fits_and_the_way_out(capsys: pytest.CaptureFixture) -> None:
    options = ["--backbones", "[qwen3-8b]", "--devices", "[1, 8]"]
    assert main(["estimate", *options]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    table = {
        (row[1].strip(), row[2].strip()): dict(
            zip((name.strip() for name in rows[0]), (cell.strip() for cell in row), strict=True)
        )
        for row in rows[2:]
    }
    assert len(table) == 6
    assert table["full", "1"]["fits"] == "no"
    assert table["full", "1"]["way out"].startswith("shard over 8")
    assert table["full", "8"]["fits"] == "yes"
    assert main(["estimate", *options, "--workload.num_tokens=0"]) == 2
    assert "`num_tokens` must be at least 1, got 0." in capsys.readouterr().err


def test_estimates_load_nothing_heavy() -> None:
    code = (
        "import sys; from lar_lightning.__main__ import main; main(['estimate']); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
