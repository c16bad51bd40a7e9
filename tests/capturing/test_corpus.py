"""Corpora read alike from every source, and a bad one is refused with its place before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.capturing import Corpus
from moescope.capturing.batches import ahead, batches
from moescope.errors import CorpusError
from tests.capturing.texts import rows, tokenizer


def texts(corpus: Corpus) -> list[tuple[int, str | None, str, dict]]:
    return [(d.number, d.id, d.text, dict(d.labels)) for d in corpus]


def jsonl(path: Path, lines: list[object]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_jsonl_parquet_and_memory_agree(tmp_path: Path) -> None:
    data = rows()
    pq.write_table(pa.Table.from_pylist(data), tmp_path / "c.parquet")
    want = texts(Corpus(data, ["kind"]))
    assert texts(Corpus(jsonl(tmp_path / "c.jsonl", list(data)), ["kind"])) == want
    assert texts(Corpus(tmp_path / "c.parquet", ["kind"])) == want
    assert texts(Corpus((row for row in data), ["kind"])) == want
    hashes = {Corpus(source, ["kind"]).census().hash for source in (data, tmp_path / "c.jsonl", tmp_path / "c.parquet")}
    assert len(hashes) == 1
    assert Corpus(data).census().hash not in hashes  # labels are part of what was captured


def test_text_files_by_line_paragraph_and_document(tmp_path: Path) -> None:
    file = tmp_path / "c.txt"
    file.write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    assert [d.text for d in Corpus(file)] == ["one", "two", "three"]
    assert [d.text for d in Corpus(file, sample_by="paragraph")] == ["one\ntwo", "three\n"]
    assert [d.text for d in Corpus(file, sample_by="document")] == ["one\ntwo\n\nthree\n"]
    assert [d.source for d in Corpus(file)] == ["c.txt:1", "c.txt:2", "c.txt:4"]


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", [{"text": "second"}])
    jsonl(tmp_path / "a.jsonl", [{"text": "first"}])
    assert [d.text for d in Corpus(tmp_path)] == ["first", "second"]


def test_empty_documents_are_counted_and_left_out() -> None:
    census = Corpus(["a", "  ", "b"]).census()
    assert (census.documents, census.empty) == (2, 1)
    assert [d.number for d in Corpus(["a", "  ", "b"])] == [0, 2]  # numbers stay those of the corpus


def test_limit() -> None:
    assert Corpus(rows(), limit=5).census().documents == 5


@pytest.mark.parametrize(
    ("lines", "labels", "sentence"),
    [
        ([], [], "no document with text"),
        ([{"text": "  "}], [], "no document with text"),
        ([{"text": "a"}, '{"text": "b"'], [], r"line 2 is not valid JSON"),
        ([{"text": "a", "kind": "x"}, {"text": "b"}], ["kind"], r"c.jsonl:2: no label 'kind'; its fields are text"),
        ([{"body": "a"}], [], "no text in the field 'text'; its fields are body"),
        ([{"text": 3}], [], "no text in the field 'text'"),
        (["[1]"], [], "expected an object"),
    ],
)
def test_bad_corpora(tmp_path: Path, lines: list[object], labels: list[str], sentence: str) -> None:
    with pytest.raises(CorpusError, match=sentence):
        Corpus(jsonl(tmp_path / "c.jsonl", lines), labels).census()


def test_missing_unknown_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no corpus at"):
        Corpus(tmp_path / "none.jsonl")
    (tmp_path / "c.docx").write_text("x")
    with pytest.raises(CorpusError, match="unknown kind"):
        Corpus(tmp_path / "c.docx")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(CorpusError, match="UTF-8"):
        Corpus(tmp_path / "c.jsonl").census()
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CorpusError, match="not a readable Parquet"):
        Corpus(tmp_path / "c.parquet").census()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(8, 200), st.integers(2, 40))
def test_batches_hold_every_token_once_within_their_size(
    lengths: list[int], batch_tokens: int, max_length: int
) -> None:
    corpus = Corpus([" ".join(["sun"] * n) for n in lengths])
    cut = list(batches(corpus, tokenizer(), max_length=max_length, batch_tokens=batch_tokens))
    seen = sorted((s.number, s.document.number, tuple(s.ids)) for batch in cut for s in batch.sequences)
    assert [number for number, _, _ in seen] == list(range(len(seen)))
    joined: dict[int, list[int]] = {}
    for _, document, ids in seen:
        joined.setdefault(document, []).extend(ids)
        assert len(ids) <= max_length
    assert [joined[d] for d in sorted(joined)] == [tokenizer()(d.text)["input_ids"] for d in corpus]
    for batch in cut:
        ids, mask = batch.padded(0)
        assert ids.size <= batch_tokens or len(ids) == 1
        assert mask.sum() == batch.n_tokens


def test_batches_are_the_same_every_time() -> None:
    def cut() -> list[list[int]]:
        found = batches(Corpus(rows(200)), tokenizer(), max_length=16, batch_tokens=64)
        return [[s.number for s in batch.sequences] for batch in found]

    assert cut() == cut()


def test_ahead_gives_the_same_items_and_passes_errors_on() -> None:
    def items():
        yield 1
        yield 2
        raise CorpusError("late")

    iterator = ahead(items())
    assert [next(iterator), next(iterator)] == [1, 2]
    with pytest.raises(CorpusError, match="late"):
        next(iterator)
