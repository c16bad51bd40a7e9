"""The reader: contexts, vocabulary, caches, the notebook view, and what importing it costs."""

import html.parser
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

import moescope.store
from moescope.errors import StoreError
from moescope.store import Batch, DocumentRow, Store, StoreWriter, aggregates
from moescope.store.html import plain

from .made import a_manifest, a_site, a_site_batch, made_batches


def write(folder, manifest, batches):
    with StoreWriter.create(folder, manifest) as writer:
        for batch in batches:
            writer.append(batch)
    return Store.open(folder)


@pytest.fixture
def store(tmp_path):
    manifest = a_manifest(settings={"shard_tokens": 50})
    return write(tmp_path / "s", manifest, made_batches(manifest, 8))


def tokens_of(text, spans, document=0, **columns):
    """One sequence: a token per span (None: no span), token ids in order."""
    n = len(spans)
    start, end = ([-1 if s is None else s[i] for s in spans] for i in (0, 1))
    return {
        "document": np.full(n, document),
        "sequence": np.full(n, document),
        "position": np.arange(n),
        "token_id": np.arange(n),
        "start": np.array(start),
        "end": np.array(end),
        **columns,
    }


def one_document(tmp_path, text, spans, texts):
    manifest = a_manifest([a_site(0)], ["routing"])
    rng = np.random.default_rng(0)
    sites = {"L000": a_site_batch(rng, manifest.sites[0], len(spans))}
    document = DocumentRow(0, None, text, "made up", {}, len(spans))
    return write(tmp_path / "s", manifest, [Batch(tokens_of(text, spans), [document], dict(enumerate(texts)), sites)])


def test_context_counts_characters_not_bytes(tmp_path):
    text = "żółw 日本語 𝄞𝄢 e\u0301nd"
    spans = [(0, 4), (4, 5), (5, 6), (6, 8), (8, 9), (9, 10), (10, 11), (11, 13), (13, 16)]
    store = one_document(tmp_path, text, spans, [text[a:b] for a, b in spans])
    for row, (a, b) in enumerate(spans):
        context = store.context(row, before=3, after=2)
        assert context.before == text[max(a - 3, 0) : a]
        assert context.token == text[a:b]
        assert context.after == text[b : b + 2]
        assert context == context.before + context.token + context.after
    assert store.context(5, before=100, after=100) == text


def test_tokens_that_share_one_character_show_it_whole(tmp_path):
    """Byte-level tokenizers cut an emoji into several tokens; each has the span of the whole character."""
    text = "a😀b"
    spans = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    store = one_document(tmp_path, text, spans, ["a", "\ufffd", "\ufffd", "\ufffd", "b"])
    for row in (1, 2, 3):
        assert tuple(vars_of(store.context(row))) == ("a", "😀", "b")


def vars_of(context):
    return context.before, context.token, context.after


def test_context_without_spans_is_made_of_token_texts(tmp_path):
    store = one_document(tmp_path, "ignored", [None] * 4, ["日本", "語 ", "is", " it"])
    assert vars_of(store.context(2, before=3, after=2)) == ("本語 ", "is", " i")
    assert vars_of(store.context(0)) == ("", "日本", "語 is it")


def test_context_across_shards_and_out_of_range(store):
    rows = store.tokens().to_pylist()
    texts = {row["document"]: row["text"] for row in store.documents().to_pylist()}
    for row in (0, 19, 20, 59, 60, 119, 120, 159):
        here = rows[row]
        assert store.context(row).token == texts[here["document"]][here["start"] : here["end"]]
    for row in (-1, 160):
        with pytest.raises(StoreError, match="no token row"):
            store.context(row)


def test_columns_and_layers_are_named_in_errors(store):
    assert store.tokens(["token_id", "document"]).column_names == ["token_id", "document"]
    with pytest.raises(StoreError, match="no column 'tok'"):
        store.tokens(["tok"])
    with pytest.raises(StoreError, match="no MoE layer 2 in this store; it has 1, 3"):
        store.routing(2)
    assert store.site("L003") is store.site(3)
    assert store.layers == [1, 3]


def test_a_layer_with_two_sites_needs_a_key(tmp_path):
    second = a_site(1).model_copy(update={"key": "L001-attention"})
    manifest = a_manifest([a_site(1), second], ["routing"])
    store = write(tmp_path / "s", manifest, made_batches(manifest, 1))
    with pytest.raises(StoreError, match="several sites; name one: L001, L001-attention"):
        store.routing(1)
    assert store.routing("L001-attention").expert.shape == (20, 2)


def test_documents_come_sorted_whatever_the_order_of_batches(tmp_path):
    manifest = a_manifest(settings={"shard_tokens": 20})
    batches = made_batches(manifest, 4)[::-1]
    writer = StoreWriter.create(tmp_path / "s", manifest)
    for batch in batches:
        writer.append(batch)
    writer.close(complete=False)
    incomplete = Store.open(tmp_path / "s")
    assert incomplete.documents()["document"].to_pylist() == [0, 1, 2, 3]
    StoreWriter.resume(tmp_path / "s", manifest).close()
    assert Store.open(tmp_path / "s").documents().equals(incomplete.documents())
    assert Store.open(tmp_path / "s").documents(["id"]).column_names == ["id"]


# Caches


def test_cached_computes_once_for_the_same_shards_and_parameters(store):
    calls = []

    def compute():
        calls.append(1)
        return pa.table({"n": [len(calls)]}, metadata={"unit": "tokens"})

    first = store.cached("counts", compute, {"by": "domain", "top": 3})
    again = Store.open(store.path).cached("counts", compute, {"top": 3, "by": "domain"})
    assert again.equals(first, check_metadata=True)
    assert store.cached("counts", compute, {"by": "domain", "top": 4})["n"][0].as_py() == 2
    assert store.cached("loads", compute)["n"][0].as_py() == 3
    assert len(calls) == 3
    assert store.check() == []


def test_more_shards_make_a_cache_old(tmp_path):
    manifest = a_manifest(settings={"shard_tokens": 20})
    batches = made_batches(manifest, 3)
    writer = StoreWriter.create(tmp_path / "s", manifest)
    writer.append(batches[0])
    writer.close(complete=False)
    count = lambda: pa.table({"n": [Store.open(tmp_path / "s").n_tokens]})  # noqa: E731
    assert Store.open(tmp_path / "s").cached("n", count)["n"][0].as_py() == 20
    with StoreWriter.resume(tmp_path / "s", manifest) as writer:
        writer.append(batches[1])
    assert Store.open(tmp_path / "s").cached("n", count)["n"][0].as_py() == 40


def test_a_table_counted_by_an_older_rule_is_counted_anew(store, monkeypatch):
    store.cached("counts", lambda: pa.table({"n": [1]}))
    monkeypatch.setattr(aggregates, "COUNTED_AS", aggregates.COUNTED_AS + 1)
    assert store.cached("counts", lambda: pa.table({"m": [2]})).column_names == ["m"]


def test_a_broken_or_foreign_cache_file_is_computed_again(store):
    table = pa.table({"n": [1]})
    store.cached("counts", lambda: table)
    (file,) = (store.path / "aggregates").iterdir()
    file.write_bytes(b"PAR1 nonsense")
    assert store.cached("counts", lambda: table) == table
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"n": [99]}), file)  # right name, other key
    assert store.cached("counts", lambda: table) == table


def test_a_kept_table_comes_back_as_it_was_and_two_writers_do_not_spoil_it(store):
    table = pa.table(
        {"n": [3, None, -1], "of": pa.array([1, 2, 3], pa.int32()), "name": ["a", None, "b"], "share": [0.5, None, 1.0]}
    )
    empty = table.slice(0, 0)
    assert store.kept("counts") is None
    with ThreadPoolExecutor(4) as threads:
        for _ in threads.map(lambda turn: store.keep("counts", {}, table), range(40)):
            assert store.kept("counts").equals(table)
    store.keep("counts", {"of": "nothing"}, empty)
    assert store.kept("counts", {"of": "nothing"}).equals(empty)
    assert len(list((store.path / "aggregates").iterdir())) == 2  # no temporary file stays


@pytest.mark.parametrize(("name", "params"), [("../x", {}), ("a/b", {}), ("", {}), ("n", {"x": object()})])
def test_a_cache_has_a_plain_name_and_plain_parameters(store, name, params):
    with pytest.raises(StoreError, match="aggregate"):
        store.cached(name, lambda: pa.table({"n": [1]}), params)


# The notebook view


class Collected(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))

    def handle_data(self, data):
        self.text += data


HOSTILE = "</td><script>alert('x')</script><img src=x onerror=\"y\">&amp;\u202egnp.exe\x00"


def test_the_notebook_view_shows_hostile_text_as_text(tmp_path):
    manifest = a_manifest(labels=["<b>label</b>"])
    manifest.model.name = manifest.corpus.source = HOSTILE
    (batch,) = made_batches(manifest, 1)
    document = DocumentRow(0, HOSTILE, HOSTILE, HOSTILE, {"<b>label</b>": HOSTILE}, 20)
    vocabulary = {**batch.vocabulary, 5: HOSTILE}
    hostile = Batch(batch.tokens, [document], vocabulary, batch.sites, batch.outliers)
    store = write(tmp_path / "<i>s", manifest, [hostile])
    page = Collected()
    page.feed(store._repr_html_())
    assert {tag for tag, _ in page.tags} == {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert not any(attrs for _, attrs in page.tags)
    assert page.text.count("<script>alert('x')</script>") == 4
    assert "\u202e" not in page.text
    assert "\x00" not in page.text
    assert "<b>label</b>" in page.text


def test_plain_leaves_ordinary_text_alone():
    assert plain("żółw 日本語 😀") == "żółw 日本語 😀"
    assert plain("a<b>&\"'") == "a&lt;b&gt;&amp;&quot;&#x27;"


def test_repr_is_one_line(store):
    assert repr(store).startswith("Store(")
    assert "160 tokens of 8 documents" in repr(store)
    assert "\n" not in repr(store)
    assert "160 of 8" in store._repr_html_()


# Imports


def test_importing_the_store_loads_no_heavy_library():
    heavy = ("torch", "pyarrow", "duckdb", "pandas", "numba")
    code = f"import sys, moescope.store; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_reading_arrays_loads_neither_torch_nor_pandas(store):
    code = (
        "import sys, moescope.store as s; routing = s.Store.open(sys.argv[1]).routing(1);"
        "routing.expert, routing.weight, routing.entropy;"
        "print([m for m in ('torch', 'duckdb', 'pandas') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(store.path)], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_every_public_name_is_there():
    for name in moescope.store.__all__:
        assert getattr(moescope.store, name).__module__.startswith("moescope.store")
    with pytest.raises(AttributeError, match="no attribute 'stroe'"):
        _ = moescope.store.stroe


def test_other_engines_read_the_files(store):
    """The layout is documented: DuckDB and pandas read a shard without MoEscope."""
    import duckdb
    import pandas as pd

    path = store.shards[0].path / "routing.parquet"
    frame = pd.read_parquet(path)
    ids = np.frombuffer(b"".join(frame["L001.expert"]), np.uint8).reshape(-1, 2)
    np.testing.assert_array_equal(ids, store.shards[0].routing(1).expert)
    with duckdb.connect() as connection:
        rows = connection.execute(f"""select "L001.weight", "L001.entropy" from '{path}'""").fetchall()
    weights = np.frombuffer(b"".join(row[0] for row in rows), "<f4").reshape(-1, 2)
    np.testing.assert_array_equal(weights, store.shards[0].routing(1).weight)
    np.testing.assert_array_equal([row[1] for row in rows], store.shards[0].routing(1).entropy)
