import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from finished_run import (
    HOSTILE,
    SEGMENT_TEXTS,
    TEXTS,
    add_training_records,
    make_finished_run,
    make_tokenizer,
    make_vocabulary,
    write_metrics,
)
from transformers import PreTrainedTokenizerFast

from lar_lightning.errors import SettingError
from lar_lightning.evaluation.examples import (
    Piece,
    choose_examples,
    marked_runs,
    parting_piece,
    pieces_of,
    sides,
)
from lar_lightning.evaluation.plots import read_curves, running_mean
from lar_lightning.evaluation.report import headline, latents, result_table, write_report
from lar_lightning.evaluation.run_contents import read_contents
from lar_lightning.evaluation.run_plots import boundary_plot, small_plots
from lar_lightning.evaluation.run_records import (
    read_alarms,
    read_samples,
    read_stages,
    read_usage,
)
from lar_lightning.segments import LatentVocabulary
from lar_lightning.tokenizer import decode, encode_text, extend_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> LatentVocabulary:
    return make_vocabulary(tokenizer)


@pytest.fixture
def run_dir(tmp_path, tokenizer, vocabulary) -> Path:
    return make_finished_run(tmp_path, tokenizer, vocabulary)


class PageReader(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.classes: Counter[str] = Counter()
        self.text = ""
        self.script = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.classes.update((dict(attrs).get("class") or "").split())

    def handle_data(self, data) -> None:
        if self.tags[-1:] == ["script"] and not self.script:
            self.script = data
        else:
            self.text += data


def read_page(run_dir: Path, base_model: str = "some/model") -> PageReader:
    return PageReader(write_report(base_model, run_dir).read_text(encoding="utf-8"))


def test_hostile_texts_are_shown_and_not_run(run_dir):
    page = read_page(run_dir, base_model="<script>model</script>")
    assert page.tags.count("script") == 1
    assert "b>" not in "".join(page.tags)
    assert page.text.count("alert('x')") >= 2
    assert "toy <b>" in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_page_allows_its_own_script_alone(run_dir):
    page = read_page(run_dir)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    (policy,) = [
        value for name, value in page.attributes if name == "content" and "script-src" in str(value)
    ]
    assert policy is not None
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "{{" not in page.script


def test_records_of_training_are_shown_and_torn_lines_left_out(run_dir):
    add_training_records(run_dir)
    page = read_page(run_dir)
    assert page.tags.count("script") == 1
    for heading in ("Alarms", "Abstraction boundary", "Written in training"):
        assert heading in page.text
    assert f"the weights are back {HOSTILE}" in page.text
    assert "largest executable vocabulary has 2 latents" in page.text
    assert "<b>0.2 nats a token are above 0.1</b>" in page.text
    assert "Taken, held out" in page.text
    assert "trainable: rows" in page.text
    assert "onload" not in page.classes
    assert [len(found) for found in (read_alarms(run_dir), read_stages(run_dir))] == [1, 3]
    assert [len(found) for found in (read_usage(run_dir), read_samples(run_dir))] == [1, 1]


def test_a_latent_is_shown_where_it_was_written(run_dir):
    rows = {row.latent.text: row for row in latents(read_contents(run_dir))}
    use = rows["def "].uses[0]
    assert (use.where, use.before, use.text) == ("task/0", "", "def ")
    assert use.after.startswith("add(a, b):")
    assert rows["never used"].uses == ()


def test_boundary_is_drawn_for_any_number_of_stages(run_dir):
    add_training_records(run_dir)
    stages = read_stages(run_dir)
    for some in (stages, stages[:1], stages[2:]):
        assert boundary_plot(some) is not None
    assert boundary_plot([]) is None


def test_every_other_metric_has_a_small_plot():
    curves = {"val/loss_nats": {1: 1.0, 2: 2.0}, "gen/x": {1: 1.0, 5: 1.0}, "once": {3: 1.0}}
    (plot,) = small_plots(curves)
    assert (plot.name, plot.first, plot.last) == ("gen/x", 1.0, 1.0)


def test_page_refers_to_nothing_outside(run_dir):
    page = read_page(run_dir)
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value is not None and value.startswith("#") for value in links)
    styles = [value for name, value in page.attributes if name == "style"]
    assert all("url(" not in (value or "").replace("url(#", "") for value in styles)


def test_each_latent_appears_with_visible_marks(run_dir):
    text = read_page(run_dir).text
    for segment_text in SEGMENT_TEXTS:
        assert segment_text.replace(" ", "\u00b7").replace("\n", "\u21b5") in text


def test_emitted_latents_are_counted_over_all_episodes(run_dir, vocabulary):
    contents = read_contents(run_dir)
    episodes = contents.episodes["lar"].values()
    table = latents(contents)
    assert sum(row.emitted for row in table) == sum(e.num_latents for e in episodes)
    assert sum(row.places for row in table) == sum(e.num_places for e in episodes)
    by_text = {row.latent.text: row.emitted for row in table}
    assert by_text == {"):\n    return ": 3, "def ": 3, "<script>": 1, "never used": 0}


def test_an_evaluation_of_another_vocabulary_is_refused(run_dir, vocabulary):
    latents = vocabulary.latents[:1]
    smaller = LatentVocabulary(latents, base_size=vocabulary.base_size)
    smaller.save(run_dir / "latent_vocabulary.json")
    with pytest.raises(SettingError, match="own latent vocabulary, got latent 2 where there are 1"):
        write_report("some/model", run_dir)


def test_pieces_hold_all_units_and_all_text(tokenizer, vocabulary):
    extended = extend_tokenizer(tokenizer, vocabulary)
    for text in [*TEXTS, "\U0001f98a", "caf\u00e9 \ufffd!"]:
        units = vocabulary.encode([*encode_text(tokenizer, text), tokenizer.eos_token_id])
        pieces = pieces_of(extended, vocabulary, units)
        assert "".join(piece.text for piece in pieces) == decode(extended, units)
        assert sum(piece.num_units for piece in pieces) == len(units)
        assert sum(piece.num_tokens for piece in pieces) == len(vocabulary.expand(units))
        kinds = Counter(piece.kind for piece in pieces)
        assert kinds["latent"] == sum(map(vocabulary.is_latent, units))
        assert kinds["special"] == 1


def test_pieces_of_a_text_that_ends_inside_a_character_keep_all_units(tokenizer, vocabulary):
    units = encode_text(tokenizer, "a\U0001f98a")[:-1]
    pieces = pieces_of(tokenizer, vocabulary, units)
    assert [piece.num_units for piece in pieces] == [1, 3]


def test_every_unit_of_an_example_is_a_span(run_dir, tokenizer, vocabulary):
    contents = read_contents(run_dir)
    vanilla, lar = contents.episodes["vanilla"], contents.episodes["lar"]
    chosen = [task for task, _ in choose_examples(vanilla, lar)]
    page = read_page(run_dir)
    pieces = [
        piece
        for task in chosen
        for side in sides(
            extend_tokenizer(tokenizer, vocabulary), vocabulary, vanilla[task], lar[task]
        )
        for piece in side.pieces
    ]
    assert page.classes["explicit"] == sum(piece.kind == "explicit" for piece in pieces)
    assert page.classes["special"] == 2 * len(chosen)
    num_elsewhere = len(vocabulary) + 4  # the table, and the legend of the colours
    assert page.classes["latent"] - num_elsewhere == sum(lar[task].num_latents for task in chosen)
    for task in chosen:
        assert f"{len(lar[task].units)} units" in page.text
        assert f"for {lar[task].num_expanded_tokens} tokens" in page.text


def test_examples_are_chosen_by_their_rules(run_dir):
    contents = read_contents(run_dir)
    vanilla, lar = contents.episodes["vanilla"], contents.episodes["lar"]
    chosen = choose_examples(vanilla, lar)
    assert [task for task, _ in chosen] == ["task/1", "task/2"]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [("abcd", "abcd", None), ("abcd", "abxd", 1), ("abcd", "ab", 1), ("abcd", "abcdef", 2)],
)
def test_texts_part_in_the_piece_with_the_first_difference(left, right, expected):
    pieces = [Piece(text=text, kind="explicit", num_units=1, num_tokens=1) for text in ("ab", "cd")]
    assert parting_piece(pieces, left, right) == expected


def test_marks_show_what_cannot_be_seen():
    assert marked_runs("a b\n") == [("a", False), ("\u00b7", True), ("b", False), ("\u21b5", True)]
    assert marked_runs("a b\n", "breaks") == [("a b", False), ("\u21b5", True), ("\n", False)]
    assert marked_runs("a\u202eb\x00", "hidden") == [
        ("a", False),
        ("\\u202e", True),
        ("b", False),
        ("\\x00", True),
    ]


@pytest.mark.parametrize(
    ("removed", "verb"),
    [
        (["results.json"], "evaluate"),
        (["logs/version_0/metrics.csv"], "fit"),
        (["evaluation/lar-0.jsonl"], "evaluate"),
        (["latent_vocabulary.json"], "mine"),
        (["export/tokenizer.json"], "export"),
    ],
)
def test_missing_parts_are_left_out_with_the_verb_that_makes_them(run_dir, removed, verb):
    assert "not there yet" not in read_page(run_dir).text
    for name in removed:
        (run_dir / name).unlink()
    page = read_page(run_dir)
    assert re.search(rf"not there yet: the verb {verb} makes it", page.text)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_run_is_refused(tmp_path, exists):
    folder = tmp_path / "nothing"
    if exists:
        folder.mkdir()
    with pytest.raises(SettingError, match="`run_dir` must hold a run to report"):
        write_report("some/model", folder)
    assert not (folder / "report.html").exists()


def test_answers_of_another_version_are_refused_in_one_line(run_dir):
    (run_dir / "evaluation" / "lar-0.jsonl").write_text(
        json.dumps({"schema": 1, "signature": {"settings": {}}})
        + "\n"
        + json.dumps({"episode": {"task_id": "a"}})
        + "\n"
    )
    with pytest.raises(SettingError, match="answers of this version"):
        write_report("some/model", run_dir)


def test_metrics_of_a_resumed_run_merge_and_the_later_version_wins(tmp_path):
    write_metrics(tmp_path, 2, [(step, 2.0) for step in (5, 10, 15, 20)])
    write_metrics(tmp_path, 10, [(step, 10.0) for step in (15, 25)])
    write_metrics(tmp_path, 11, [])
    curves = read_curves(tmp_path / "logs")
    assert curves["train/folded_nats"] == {5: 2.0, 10: 2.0, 15: 10.0, 25: 10.0}
    assert curves["val/loss_nats"] == {10: 2.0}


def test_a_torn_line_of_metrics_is_read_as_far_as_it_goes(tmp_path):
    write_metrics(tmp_path, 0, [(5, 1.0)])
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open("a") as file:
        file.write("10,0.5,nan")
    curves = read_curves(tmp_path / "logs")
    assert curves["train/folded_nats"] == {5: 1.0, 10: 0.5}
    assert curves["train/split_nats"] == {5: 1.0}


def test_running_mean_looks_back_only():
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_headline_tells_savings_from_shorter_texts():
    vanilla = {"expanded_tokens": 200, "agreement": 1.0, "num_runs": 1}
    lar = {"expanded_tokens": 100, "units_per_expanded_token": 0.9, "agreement": 0.2, "num_runs": 1}
    figures = headline(vanilla, lar)
    assert figures is not None
    assert figures["saved_by_latents"] == pytest.approx(0.1)
    assert figures["change_of_text"] == pytest.approx(-0.5)
    assert figures["floor"] is None


def test_a_score_stands_beside_its_interval_and_p_against_vanilla(run_dir: Path) -> None:
    rows = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    score = next(column for column in result_table(rows) if column["name"] == "Score")
    (_, below_vanilla), (_, below_lar) = score["cells"]
    assert "p =" not in below_vanilla
    assert re.search(r" to .*; p = [\d.e-]+ against vanilla$", below_lar)
