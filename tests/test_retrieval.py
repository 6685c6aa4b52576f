import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lar_lightning.benchmarks.questions import retrieval_server
from lar_lightning.benchmarks.questions.jsonl_files import find_files
from lar_lightning.benchmarks.questions.retrieval import (
    Bm25Retriever,
    Passage,
    passage_of,
    split_passage,
    unquote,
)
from lar_lightning.benchmarks.questions.retrieval_server import HttpRetriever, RetrieverDown

SHARED_QA = Path(__file__).parents[1].parent / "shared" / "data" / "bench_qa"
RECORDS = [
    {"title": "Tolvik", "text": "Tolvik is a town on the river Arn."},
    {"contents": '"Ilse Marrow"\nIlse Marrow painted ""Harbour"" in\n1900.'},
    {"id": 0, "query": "q", "context": [["7", "Arn\nThe Arn is a river."], ["8", "no title"]]},
    {"title": "Tolvik", "text": "Tolvik  is a town on\nthe river Arn."},
]


def write(path: Path, records: list) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_all_forms_of_a_corpus_are_read_and_duplicates_left_out(tmp_path, capsys):
    retriever = Bm25Retriever([write(tmp_path / "corpus.jsonl.gz", RECORDS)])
    retriever.prepare()
    assert capsys.readouterr().out.startswith("corpus: indexed 4 passages of 1 files in ")
    assert [passage.title for passage in retriever.search("Tolvik town", 5)] == ["Tolvik"]
    assert retriever.search("who painted?", 3) == [
        Passage("Ilse Marrow", 'Ilse Marrow painted "Harbour" in 1900.')
    ]
    assert {passage.title for passage in retriever.search("river", 5)} == {"Tolvik", "Arn"}
    assert retriever.search("title", 5) == [Passage("", "no title")]


@pytest.mark.parametrize("query", ["", "the", "?!", "unheardof", "\u0000"])
def test_query_without_a_known_word_finds_nothing(tmp_path, query):
    retriever = Bm25Retriever([write(tmp_path / "corpus.jsonl", RECORDS)])
    assert retriever.search(query, 3) == []


@given(st.text(max_size=30), st.integers(1, 9))
def test_any_query_finds_at_most_k_passages(tmp_path_factory, query, k):
    path = tmp_path_factory.getbasetemp() / "any_query.jsonl"
    if not path.exists():
        write(path, RECORDS)
    assert len(Bm25Retriever([path]).search(query, k)) <= k


def test_rarer_words_count_more_and_ties_keep_the_order(tmp_path):
    texts = ["red house", "red door", "red car", "blue car"]
    path = write(tmp_path / "c.jsonl", [{"title": "", "text": text} for text in texts])
    found = [passage.text for passage in Bm25Retriever([path]).search("red blue", 3)]
    assert found == ["blue car", "red house", "red door"]


def test_index_is_built_once_for_all_threads(tmp_path, capsys):
    path = write(tmp_path / "corpus.jsonl", RECORDS)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: Bm25Retriever([path]).search("river", 2), range(32)))
    assert found == [found[0]] * 32
    assert capsys.readouterr().out.count("indexed") == 1


def test_changed_file_is_indexed_anew(tmp_path):
    path = write(tmp_path / "corpus.jsonl", RECORDS[:1])
    assert Bm25Retriever([path]).search("painted", 1) == []
    write(path, RECORDS)
    assert len(Bm25Retriever([path]).search("painted", 1)) == 1


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=40), st.integers(1, 12))
def test_long_passages_are_split_evenly_and_nothing_is_lost(words, max_words):
    parts = list(split_passage(Passage("t", " ".join(words)), max_words))
    lengths = [len(part.text.split()) for part in parts]
    assert [word for part in parts for word in part.text.split()] == words
    assert max(lengths, default=0) <= max_words
    assert max(lengths, default=0) - min(lengths, default=0) <= 1
    assert {part.title for part in parts} <= {"t"}


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ('"Gary Groth"', "Gary Groth"),
        ('"Who wrote ""Emma""?"', 'Who wrote "Emma"?'),
        ('"Emma" or "Persuasion"', '"Emma" or "Persuasion"'),
        ("Emma", "Emma"),
        ('"', '"'),
        ('""', '""'),
        ("", ""),
    ],
)
def test_quotes_of_csv_are_taken_off(text, plain):
    assert unquote(text) == plain


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ('{"body": "x"}', r"c\.jsonl:2 \(no text in"),
        ('{"context": [5]}', r"c\.jsonl:2 \(no text in '5'\)"),
        ('{"context": "text"}', r"c\.jsonl:2"),
        ("{torn", r"c\.jsonl at or after line 2"),
        ("[1]", r"c\.jsonl at or after line 2 \(a JSON list\)"),
        ("\udcff", r"c\.jsonl at or after line"),
    ],
)
def test_foreign_record_is_refused_with_its_line(tmp_path, record, fault):
    path = tmp_path / "c.jsonl"
    text = '{"title": "a", "text": "b"}\n' + record + "\n"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"`corpus` must hold .*{fault}"):
        Bm25Retriever([path]).prepare()


def test_torn_gzip_file_is_refused(tmp_path):
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"title": "a", "text": "b"}\n' * 999)[:-20])
    with pytest.raises(ValueError, match="`corpus` must hold one JSON object a line"):
        Bm25Retriever([path]).prepare()


@pytest.mark.parametrize("records", [[], [{"title": "", "text": "the ?"}]])
def test_corpus_without_words_is_refused(tmp_path, records):
    with pytest.raises(ValueError, match="`corpus` must hold passages with words"):
        Bm25Retriever([write(tmp_path / "c.jsonl", records)]).prepare()


def test_files_are_found_by_paths_and_globs_once_each(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write(tmp_path / name, [])
    found = find_files("corpus", f"{tmp_path}/b.jsonl, {tmp_path}/*.jsonl")
    assert [file.name for file in found] == ["b.jsonl", "a.jsonl"]


@pytest.mark.parametrize("text", ["nowhere.jsonl", "no*where", ",", "."])
def test_missing_files_are_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`corpus` must name"):
        find_files("corpus", text)


def test_passages_that_were_retrieved_for_questions_are_found_again():
    if not SHARED_QA.is_dir():
        pytest.skip(f"no recorded passages in {SHARED_QA}")
    retriever = Bm25Retriever(find_files("corpus", f"{SHARED_QA}/bamboogle_retrieved_*"))
    best = retriever.search("When was the City Bank of New York founded?", 3)
    assert any("founded on June 16, 1812" in passage.text for passage in best)


Answer = Callable[[dict], tuple[int, bytes]]


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[dict]]]:
    """Serve what `answer` makes of each request; yields the address and the requests so far."""
    requests: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request)
            status, body = answer(request)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # clients hang up on purpose

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/retrieve", requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retrieval_server, "_WAITS", (0.01, 0.01))


def as_json(value: object) -> Answer:
    return lambda request: (200, json.dumps(value).encode())


CONTENTS = {"id": "1", "contents": '"Arn"\nThe Arn is a river.'}


@pytest.mark.parametrize(
    "answer",
    [
        {"result": [[CONTENTS]]},
        {"result": [[{"document": CONTENTS, "score": 1.5}]]},
        {"result": [[{"title": "Arn", "text": "The Arn is a river."}]]},
        {"result": [CONTENTS]},
        {"results": [[CONTENTS]]},
        [[CONTENTS]],
    ],
)
def test_usual_answers_of_servers_are_read(answer, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(as_json(answer)) as (url, requests):
        retriever = HttpRetriever(url)
        retriever.prepare()
        assert retriever.search("river?", 3) == [Passage("Arn", "The Arn is a river.")]
    assert requests[1] == {"queries": ["river?"], "topk": 3, "return_scores": False}


def test_no_more_passages_than_asked_for():
    with serving(as_json({"result": [[CONTENTS] * 5]})) as (url, _):
        assert len(HttpRetriever(url).search("river", 3)) == 3


def test_no_passages_are_an_answer_too():
    with serving(as_json({"result": [[]]})) as (url, _):
        assert HttpRetriever(url).search("river", 3) == []


def test_passing_trouble_is_waited_out():
    states = iter([503, 429, 200])
    body = json.dumps({"result": [[CONTENTS]]}).encode()
    with serving(lambda request: (next(states), body)) as (url, requests):
        assert len(HttpRetriever(url).search("river", 3)) == 1
    assert len(requests) == 3


def hang(request: dict) -> tuple[int, bytes]:
    time.sleep(0.6)
    return 200, b"{}"


@pytest.mark.parametrize(
    ("answer", "num_tries", "reason"),
    [
        (lambda request: (500, b"boom"), 3, "3 tries.*HTTP Error 500"),
        (lambda request: (200, b"<html>"), 3, "3 tries.*an answer that is not JSON"),
        (lambda request: (200, b"\xff\xfe"), 3, "3 tries.*an answer that is not JSON"),
        (hang, 3, "3 tries.*timed out"),
        (lambda request: (404, b""), 1, "refuses the request with status 404"),
        (as_json({"detail": "no"}), 1, "answers in another form"),
        (as_json("no"), 1, "answers in another form"),
        (as_json({"result": [[{"id": 3}]]}), 1, "passages in another form"),
    ],
)
def test_unusable_server_is_told_in_words(answer, num_tries, reason):
    # A busy machine may need longer than a moment for an answer that is there.
    timeout_seconds = 0.2 if answer is hang else 30
    with serving(answer) as (url, requests):
        with pytest.raises(RetrieverDown, match=f"the retriever at {url} .*{reason}"):
            HttpRetriever(url, timeout_seconds=timeout_seconds).search("river", 3)
        assert len(requests) == num_tries


def test_dripping_server_is_given_up(monkeypatch):
    class Drip(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b" ")
                time.sleep(0.05)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass

    monkeypatch.setattr(retrieval_server, "_WAITS", ())
    with Server(("127.0.0.1", 0), Drip) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        retriever = HttpRetriever(f"http://127.0.0.1:{server.server_address[1]}", 0.2)
        with pytest.raises(RetrieverDown, match=r"no whole answer in 0\.2 s"):
            retriever.search("river", 3)
        server.shutdown()


def test_server_that_is_not_there_is_a_fault_of_the_setting_before_the_run():
    with serving(as_json({})) as (url, _):
        pass
    with pytest.raises(RetrieverDown, match="gave no answer in 3 tries"):
        HttpRetriever(url).search("river", 3)
    with pytest.raises(ValueError, match=r"`retriever` must be a server that answers.*Start it"):
        HttpRetriever(url).prepare()


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/passwd", "http://", "x", "http://[", "http://a:b"]
)
def test_other_addresses_are_refused(url):
    with pytest.raises(ValueError, match="`retriever` must be an address like"):
        HttpRetriever(url)


def test_passage_without_text_is_no_passage():
    with pytest.raises(ValueError, match="no text in"):
        passage_of({"document": {"id": 1}})
