"""The verb `export`: what it writes, how it checks itself, and what it refuses."""

import json
import random
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import in_shards
from whole_runs import TEN_STEPS, fit_arguments, fit_until

from lar_lightning.__main__ import main
from lar_lightning.artefacts import write_json
from lar_lightning.base_models import load_tokenizer
from lar_lightning.export.checkpoint import SOURCE_FILE, load_trained_student
from lar_lightning.export.checks import logit_distances
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tokenizer import decode, encode_text


def export(run_dir: Path, checkpoint: Path | str, *options: str) -> int:
    return main(["export", f"--base_model={checkpoint}", f"--run_dir={run_dir}", *options])


@pytest.fixture(scope="module")
def exported(trained: Path, tiny_checkpoint: Path) -> Path:
    """A run with its export; copy before changing it."""
    assert export(trained, tiny_checkpoint) == 0
    return trained


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def origin_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SOURCE_FILE).read_text())


def test_an_export_is_whole_and_says_how_it_was_checked(
    exported: Path, tiny_checkpoint: Path
) -> None:
    folder = exported / "export"
    names = {file.name for file in folder.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "chat_template.jinja", "latent_vocabulary.json"),
        *("README.md", SOURCE_FILE),
    }
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    checks = origin_of(folder)["checks"]
    assert checks["num_texts"] > 100
    assert set(checks["logit_distances"]) == {"base", "latents"}
    assert max(checks["logit_distances"].values()) < checks["logit_tolerance"] / 2
    counts = checks["reencoding"]["held_out"]
    assert counts["assistant"]["equal_share"] > 0.9
    assert counts["assistant"]["units"] < counts["assistant"]["tokens"]
    assert str(exported) not in (folder / SOURCE_FILE).read_text()


def test_the_card_names_base_corpus_size_and_licence_and_no_folder(
    exported: Path, tiny_checkpoint: Path
) -> None:
    card = (exported / "export" / "README.md").read_text()
    vocabulary = LatentVocabulary.load(exported)
    assert card.startswith("---\nlibrary_name: transformers\n")
    for said in (
        f"| base model | {tiny_checkpoint.name} |",
        "| mined from | humaneval",
        f"| latent actions (K) | {len(vocabulary)} |",
        "| precision | bfloat16 |",
        "## Licence",
    ):
        assert said in card
    assert str(tiny_checkpoint.parent) not in card


def test_rollouts_in_shards_are_the_corpus_too(run: Path, tiny_checkpoint: Path) -> None:
    in_shards(run)
    shutil.rmtree(run / "export")
    assert export(run, tiny_checkpoint) == 0
    assert origin_of(run / "export")["checks"]["num_texts"] == 164
    assert "| mined from | humaneval" in (run / "export" / "README.md").read_text()


def test_a_reused_export_takes_in_what_was_evaluated_since_and_the_licence_of_its_base(
    run: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (base / "LICENSE").write_text("terms")
    row = {"method": "lar", "benchmark": "humaneval", "num_tasks": 4, "score": 0.25}
    write_json(run / "results.json", [row])
    weights = (run / "export" / "model.safetensors").stat().st_mtime_ns
    assert export(run, base) == 0
    assert "export: reused" in capsys.readouterr().out
    assert (run / "export" / "model.safetensors").stat().st_mtime_ns == weights
    card = (run / "export" / "README.md").read_text()
    assert "| lar | 0.250 |" in card
    assert "license: apache-2.0" in card
    assert export(run, base, f"--export_dir={tmp_path / 'other'}") == 0
    assert (tmp_path / "other" / "LICENSE").read_text() == "terms"


def test_precision_shards_and_folder_can_be_chosen_and_are_kept(
    run: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    target = tmp_path / "chosen"
    options = (f"--export_dir={target}", "--dtype=float32", "--max_shard_size=200KB")
    assert export(run, tiny_checkpoint, *options) == 0
    shards = sorted(target.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert (target / "model.safetensors.index.json").exists()
    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert model.dtype == torch.float32
    vocabulary = LatentVocabulary.load(run)
    student = load_trained_student(tiny_checkpoint, vocabulary, run / "checkpoints" / "last.ckpt")
    rows = model.get_input_embeddings().weight[vocabulary.base_size :][: len(vocabulary)]
    assert torch.equal(rows, student.rows.input_rows)
    capsys.readouterr()
    assert export(run, tiny_checkpoint, f"--export_dir={target}") == 0
    assert f"export: reused {target} (float32)" in capsys.readouterr().out
    assert export(run, tiny_checkpoint, f"--export_dir={target}", "--dtype=bfloat16") == 0
    assert origin_of(target)["dtype"] == "bfloat16"
    assert origin_of(run / "export")["dtype"] == "bfloat16"


def refused(
    said: str, capsys: pytest.CaptureFixture, run: Path, base: Path | str, *options: str
) -> None:
    """Check that an export is refused, and that nothing changes on disk."""
    before = listing(run.parent)
    capsys.readouterr()
    assert export(run, base, *options) == 2
    error = capsys.readouterr().err
    assert said in error, error
    assert listing(run.parent) == before


def listing(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_mtime_ns
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture
def bare(run: Path) -> Path:
    """A trained run without its export."""
    shutil.rmtree(run / "export")
    return run


def test_a_run_stopped_in_the_middle_is_refused_unless_its_checkpoint_is_named(
    run_dir: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    arguments = fit_arguments(run_dir, tiny_checkpoint, *TEN_STEPS)
    fit_until(7, arguments, monkeypatch)
    refused("stopped at step 5 of 10", capsys, run_dir, tiny_checkpoint)
    named = f"--ckpt_path={run_dir / 'checkpoints' / 'last.ckpt'}"
    assert export(run_dir, tiny_checkpoint, named) == 0
    assert main(arguments) == 0
    capsys.readouterr()
    assert export(run_dir, tiny_checkpoint) == 0
    assert "export: made" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folder", "file", "other run", "empty"])
def test_a_target_that_holds_something_else_is_refused(
    kind: str, bare: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
    if kind == "folder":
        (target / "notes.txt").write_text("mine")
    elif kind == "other run":
        write_json(target / SOURCE_FILE, {"run": "f00d", "made_from": {}})
    refused(
        "`export_dir` must be a folder that does not exist yet",
        capsys,
        bare,
        tiny_checkpoint,
        f"--export_dir={target}",
    )


def test_a_folder_export_that_is_not_ours_is_left_alone(
    bare: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    (bare / "export").mkdir()
    (bare / "export" / "thesis.txt").write_text("mine")
    refused("which holds something else", capsys, bare, tiny_checkpoint)


def test_a_base_model_that_is_missing_is_refused(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("`base_model` must be a folder", capsys, bare, tmp_path / "nowhere")
    empty = tmp_path / "base"
    empty.mkdir()
    refused("a checkpoint with a config.json", capsys, bare, empty)


def doubled(latents: list[dict[str, Any]]) -> None:
    latents[1]["text"] = latents[0]["text"]


def renamed(latents: list[dict[str, Any]]) -> None:
    latents[0]["text"] += " and more"


def replaced(latents: list[dict[str, Any]]) -> None:
    latents[0]["segment"] = latents[0]["segment"][::-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (doubled, "for latents 0 and 1. Mine again"),
        (renamed, "for latent 0, whose segment reads"),
        (replaced, "for latent 0, whose segment reads"),
    ],
)
def test_a_vocabulary_that_text_cannot_tell_apart_is_refused(
    change: Callable[[list[dict[str, Any]]], None],
    said: str,
    bare: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    path = bare / "latent_vocabulary.json"
    content = json.loads(path.read_text())
    change(content["latents"])
    path.write_text(json.dumps(content))
    refused(said, capsys, bare, tiny_checkpoint)


def test_another_vocabulary_than_the_trained_one_is_refused(
    bare: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    vocabulary = LatentVocabulary.load(bare)
    fewer = LatentVocabulary(
        vocabulary.latents[:-1],
        base_size=vocabulary.base_size,
        tokenizer_fingerprint=vocabulary.tokenizer_fingerprint,
    )
    fewer.save(bare / "latent_vocabulary.json")
    refused("latent_vocabulary: ", capsys, bare, tiny_checkpoint)


@pytest.mark.parametrize("size", ["5", "GB", "-1GB", "0MB", "5 apples"])
def test_a_size_of_files_that_is_none_is_refused(
    size: str, bare: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    refused(
        "`max_shard_size` must be a size",
        capsys,
        bare,
        tiny_checkpoint,
        f"--max_shard_size={size}",
    )


def wrong_rows(folder: Path) -> None:
    change_weights(folder, "model.embed_tokens.weight", lambda rows: rows.roll(1, dims=0))


def wrong_layer(folder: Path) -> None:
    change_weights(folder, "model.layers.0.mlp.down_proj.weight", lambda matrix: matrix * 1.5)


def lost_layer(folder: Path) -> None:
    change_weights(folder, "model.layers.0.mlp.down_proj.weight", lambda _: None)


def wrong_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def special_latents(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1]["special"] = True
    path.write_text(json.dumps(content))


def change_weights(folder: Path, name: str, change: Callable[[torch.Tensor], Any]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights[name] = change(weights[name])
    kept = {key: value.contiguous() for key, value in weights.items() if value is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (wrong_rows, "trained input rows of latents"),
        (wrong_layer, "trained student's logits"),
        (lost_layer, "missing_keys"),
        (wrong_template, "keep the chat template"),
        (special_latents, "as one unit that is its text"),
    ],
)
def test_an_export_that_is_not_what_was_trained_leaves_nothing(
    damage: Callable[[Path], None],
    said: str,
    bare: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lar_lightning.export import checkpoint as module

    write = module.write_checkpoint

    def damaged(*given: Any, **options: Any) -> None:
        write(*given, **options)
        damage(given[3])

    monkeypatch.setattr(module, "write_checkpoint", damaged)
    refused(said, capsys, bare, tiny_checkpoint)
    assert not (bare / "export").exists()


def test_an_export_that_fails_leaves_the_older_one(
    run: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lar_lightning.export import checkpoint as module

    write = module.write_checkpoint

    def damaged(*given: Any, **options: Any) -> None:
        write(*given, **options)
        wrong_layer(given[3])

    monkeypatch.setattr(module, "write_checkpoint", damaged)
    refused("logits", capsys, run, tiny_checkpoint, "--dtype=float16")
    assert origin_of(run / "export")["dtype"] == "bfloat16"


def test_one_wrong_latent_does_not_hide_behind_many_right_logits() -> None:
    expected = torch.randn(2, 8, 1010, generator=torch.Generator().manual_seed(0))
    found = expected.clone()
    found[..., 1003] += 0.2
    distances = logit_distances(found, expected, base_size=1000)
    assert distances["base"] == 0
    assert distances["latents"] == pytest.approx(0.2, rel=0.05)


CODE = (
    "def f(x):\n    return x\n",
    "if (a && b) {\n\treturn `${c}`;\n}",
    "SELECT * FROM t WHERE a = 'b';",
    '<div class="x">&nbsp;</div>',
    "\\begin{align} x^2 \\end{align}",
    "#!/bin/sh\ngrep -r 'x' . | wc -l",
    "```python\n",
    "  \r\n\t",
)


def any_character(source: random.Random) -> str:
    """Return one of all characters that there are, each script as likely as another."""
    while True:
        plane = source.choice((0x80, 0x800, 0x3000, 0xA000, 0x10000, 0x1F700, 0x2FFFF, 0x110000))
        character = chr(source.randrange(plane))
        if unicodedata.category(character) != "Cs":  # halves of characters are no text
            return character


def random_strings(pieces: list[str], num: int, seed: int) -> Iterator[str]:
    source = random.Random(seed)

    def written() -> str:
        kind = source.randrange(7)
        if kind == 0:
            return "".join(any_character(source) for _ in range(source.randrange(1, 12)))
        if kind == 1:
            return source.choice(CODE)
        if kind == 2:
            return json.dumps(
                {any_character(source): source.random(), "id": [None, source.choice(pieces)]},
                ensure_ascii=source.random() < 0.5,
                indent=source.choice((None, 2)),
            )
        if kind == 3:  # bytes that are no UTF-8, as a program would have read them
            return source.randbytes(source.randrange(1, 9)).decode(
                errors=source.choice(("replace", "ignore", "backslashreplace"))
            )
        if kind == 4:  # a latent, or a part of one
            piece = source.choice(pieces)
            return piece[source.choice((0, 0, 1)) : source.choice((len(piece), len(piece), -1))]
        if kind == 5:
            return source.choice((" ", "\n", "\t", "\0", "\u200b", "\ufeff", "e\u0301", "\u202e"))
        return chr(source.randrange(32, 127)) * source.randrange(1, 5)

    for _ in range(num):
        yield "".join(written() for _ in range(source.randrange(9)))


def test_ten_thousand_random_strings_come_back_as_they_were(exported: Path) -> None:
    tokenizer = load_tokenizer(exported / "export")
    vocabulary = LatentVocabulary.load(exported / "export")
    strings = list(random_strings([latent.text for latent in vocabulary.latents], 10_000, seed=0))
    encoded: Any = tokenizer(strings, add_special_tokens=False)["input_ids"]
    assert sum(any(map(vocabulary.is_latent, units)) for units in encoded) > 3000
    scripts = {unicodedata.name(letter, "?").split()[0] for text in strings for letter in text}
    assert len(scripts) > 200
    assert any("\ufffd" in text for text in strings)
    for text, units in zip(strings, encoded, strict=True):
        assert decode(tokenizer, units) == text
        assert decode(tokenizer, vocabulary.expand(units)) == text


def test_bytes_that_are_no_text_come_back_as_bytes(exported: Path) -> None:
    """The ids of a byte-level tokenizer hold any bytes; a latent among them changes none."""
    tokenizer = load_tokenizer(exported / "export")
    vocabulary = LatentVocabulary.load(exported / "export")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    known = {letters[byte]: byte for byte in range(256)}
    ids: Any = tokenizer.convert_tokens_to_ids(list(letters.values()))
    source = random.Random(0)
    latent = vocabulary.base_size
    segment = vocabulary.latents[0].segment
    for _ in range(200):
        raw = source.randbytes(source.randrange(1, 20))
        units = [ids[list(letters).index(byte)] for byte in raw]
        tokens: Any = tokenizer.convert_ids_to_tokens(vocabulary.expand([*units, latent]))
        assert bytes(known[letter] for letter in "".join(tokens[: len(raw)])) == raw
        assert decode(tokenizer, [*units, latent]) == decode(tokenizer, [*units, *segment])


def test_latents_are_not_part_of_the_vocabulary_file_twice(exported: Path) -> None:
    stored = json.loads((exported / "export" / "latent_vocabulary.json").read_text())
    latents = [asdict(latent) for latent in LatentVocabulary.load(exported).latents]
    assert stored["latents"] == json.loads(json.dumps(latents))
    tokenizer = load_tokenizer(exported / "export")
    assert len(encode_text(tokenizer, latents[0]["text"])) == 1


@pytest.fixture
def hub_settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A hub at a closed port, and nobody logged in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    return monkeypatch


@pytest.mark.parametrize(
    ("repository", "setting", "said"),
    [
        ("some/name", "offline", "while HF_HUB_OFFLINE is set"),
        ("some/name", "nobody", "without a log-in"),
        ("some/name", "closed", "does not"),
        ("not a name", "closed", "must be a name such as organisation/model"),
    ],
)
def test_a_hub_that_will_not_take_it_is_known_before_any_work(
    repository: str,
    setting: str,
    said: str,
    bare: Path,
    tiny_checkpoint: Path,
    hub_settings: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    if setting == "offline":
        hub_settings.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if setting == "closed":
        hub_settings.setattr("huggingface_hub.get_token", lambda: "hf_none")
        hub_settings.setenv("HF_TOKEN", "hf_none")
    refused(said, capsys, bare, tiny_checkpoint, "--push-to-hub", repository)
