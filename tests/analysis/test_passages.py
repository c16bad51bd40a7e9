"""Passages, one token through all layers, lists of documents and of occurrences: against reading all there is."""

import random
import shutil
from contextlib import suppress

import numpy as np
import pytest

from moescope import analysis
from moescope.analysis import contents
from moescope.analysis.contents import contents_of
from moescope.errors import MoescopeError, StoreError
from moescope.store import Batch, DocumentRow, Store, StoreWriter
from moescope.store.tables import ROW_GROUP
from tests.analysis.made_stores import random_truth, write
from tests.store.made import a_manifest, a_site, a_site_batch, made_batches


def stored(path, manifest, batches):
    with StoreWriter.create(path, manifest) as writer:
        for batch in batches:
            writer.append(batch)
    return Store.open(path)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Layers of 8 and 5 experts, the second with slots that can be missing and two routers; loss; three shards."""
    sites = [a_site(1), a_site(3, 5, 3, slots_can_miss=True), a_site(3, 4, 1).model_copy(update={"key": "L003b"})]
    manifest = a_manifest(sites, ["routing"], settings={"shard_tokens": 60}, loss=True)
    return stored(tmp_path_factory.mktemp("s") / "s", manifest, made_batches(manifest, 8))


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Documents in several sequences, the sequences of the whole store in random order and over several shards."""
    rng = np.random.default_rng(3)
    made = random_truth(rng, 12, (6, 6), (2, 2), longest=60, context=9)
    order = rng.permutation(np.unique(made.sequence))
    rows = np.concatenate([np.flatnonzero(made.sequence == s) for s in order])
    made = made.part(rows)
    labels = {"domain": [("law", "code", None)[d % 3] for d in range(12)], "kind": [f"k{d % 2}" for d in range(12)]}
    texts = [f"Text number {d}: a.b(c) {'Straße ' * d}" for d in range(12)]
    return made, texts, write(tmp_path_factory.mktemp("c") / "c", made, (6, 6), labels, cuts=5, texts=texts)


def test_a_passage_is_what_the_whole_store_holds(ragged):
    for layer in (1, "L003", "L003b"):
        routing, tokens = ragged.routing(layer), ragged.tokens()
        rows = np.flatnonzero(tokens["document"].to_numpy() == 4)
        found = analysis.passage(ragged, 4, layer)
        valid = np.ones_like(routing.expert, bool) if routing.valid is None else routing.valid
        assert found["row"].values.tolist() == rows.tolist()
        assert (found["expert"].values == np.where(valid, routing.expert.astype(int), -1)[rows]).all()
        np.testing.assert_array_equal(found["weight"].values, np.where(valid, routing.weight, np.nan)[rows])
        for name in ("entropy", "margin"):
            np.testing.assert_array_equal(found[name].values, getattr(routing, name)[rows])
        assert np.isnan(found["loss"].values[0])
        assert np.isfinite(found["loss"].values[1:]).all()
        assert found["phase"].values.tolist() == ["prefill"] * 17 + ["decode"] * 3
        assert "".join(found["text"].values) == ragged.documents()["text"][4].as_py()
        assert len(analysis.table(found)) == 20 * 1


def test_pages_make_up_the_document_in_its_own_order(cut):
    made, _, store = cut
    for document in range(12):
        rows = np.flatnonzero(made.document == document)
        rows = rows[np.lexsort((made.position[rows], made.sequence[rows]))]
        pages = [analysis.passage(store, document, 1, start, start + 7) for start in range(0, rows.size, 7)]
        assert np.concatenate([page["row"] for page in pages]).tolist() == rows.tolist()
        assert (np.concatenate([page["expert"] for page in pages]) == made.expert[1][rows]).all()
        assert {page.attrs["n_tokens"] for page in pages} == {rows.size}
        assert np.concatenate([page["token"] for page in pages]).tolist() == list(range(rows.size))


def one_text(tmp_path, text, spans, sequence=None):
    manifest = a_manifest([a_site(0)], ["routing"])
    n, rng = len(spans), np.random.default_rng(0)
    tokens = {
        "document": np.zeros(n, int),
        "sequence": np.zeros(n, int) if sequence is None else np.array(sequence),
        "position": np.arange(n),
        "token_id": np.arange(n),
        "start": np.array([a for a, _ in spans]),
        "end": np.array([b for _, b in spans]),
    }
    words = {i: "" if a < 0 else text[a:b] for i, (a, b) in enumerate(spans)}
    sites = {"L000": a_site_batch(rng, manifest.sites[0], n)}
    return stored(tmp_path / "s", manifest, [Batch(tokens, [DocumentRow(0, None, text, "", {}, n)], words, sites)])


def test_pages_joined_read_as_the_text_with_skipped_space_and_shared_characters(tmp_path):
    text = "  Hello  <b>  𝄞z end"
    # A special token, skipped spaces, and one character that three tokens share.
    spans = [(-1, -1), (2, 7), (9, 12), (14, 15), (14, 15), (14, 15), (15, 16), (17, 20)]
    store = one_text(tmp_path, text, spans)
    for step in range(1, 9):
        pages = [analysis.passage(store, 0, 0, start, start + step) for start in range(0, 8, step)]
        assert "".join(piece for page in pages for piece in page["text"].values) == text, step


def test_a_token_through_all_layers(ragged):
    for row in (0, 59, 60, 61, 159):
        found = analysis.token_routing(ragged, row)
        assert found["site"].values.tolist() == ["L001", "L003", "L003b"]
        for place, key in enumerate(found["site"].values):
            routing = ragged.routing(key)
            k = ragged.site(key).top_k
            valid = np.ones(k, bool) if routing.valid is None else routing.valid[row]
            expect = np.where(valid, routing.expert[row].astype(int), -1)
            assert found["expert"].values[place].tolist() == [*expect, *[-1] * (3 - k)]
            np.testing.assert_array_equal(found["weight"].values[place, :k][valid], routing.weight[row][valid])
            assert np.isnan(found["weight"].values[place][found["expert"].values[place] < 0]).all()
            assert found["margin"].values[place] == routing.margin[row]
            if valid.any():
                assert np.nansum(found["share"].values[place]) == pytest.approx(1)
        assert found.attrs["token_id"] == ragged.tokens(["token_id"])["token_id"][row].as_py()
    with pytest.raises(StoreError, match="160 rows"):
        analysis.token_routing(ragged, 160)


def test_documents_are_found_as_by_reading_them(cut, monkeypatch):
    _, texts, store = cut

    def numbers(**asked):
        page = analysis.find_documents(store, **asked)
        return [one.document for one in page.documents], page.total

    for held in (contents.HELD_TEXT, 0):
        monkeypatch.setattr(contents, "HELD_TEXT", held)
        fresh = Store.open(store.path)
        for wanted in ("NUMBER 1", "A.B(C)", "a.b.c", ".*", "STRAßE STRAßE straße", "\\", "Text number 11"):
            page = analysis.find_documents(fresh, text=wanted)
            expect = [d for d, text in enumerate(texts) if wanted.lower() in text.lower()]
            assert ([one.document for one in page.documents], page.total) == (expect, len(expect)), wanted
    assert numbers(where={"domain": "law", "kind": ["k1"]}) == ([3, 9], 2)
    assert numbers(where={"domain": "law"}, offset=1, limit=2) == ([3, 6], 4)
    by_size = sorted(range(12), key=lambda d: (-contents_of(store).n_tokens(d), d))
    assert numbers(sort="n_tokens", descending=True)[0] == by_size
    assert numbers(sort="domain")[0] == [1, 4, 7, 10, 0, 3, 6, 9, 2, 5, 8, 11]
    assert numbers(sort="document", descending=True)[0] == list(range(11, -1, -1))
    one = analysis.find_documents(store, offset=11).documents[0]
    assert (one.opening, one.labels) == (texts[11][:120], {"domain": None, "kind": "k1"})
    with pytest.raises(MoescopeError, match="no label 'nope'"):
        numbers(where={"nope": "x"})
    with pytest.raises(MoescopeError, match="sort by"):
        numbers(sort="text")


def test_every_occurrence_is_listed_once_with_its_own_context(cut):
    made, _, store = cut
    for token in range(21):
        rows = np.flatnonzero(made.token_id == token)
        pages = [analysis.token_occurrences(store, token, offset=o, limit=4, around=3) for o in range(0, rows.size, 4)]
        listed = [one for page in pages for one in page.occurrences]
        assert [one.row for one in listed] == rows.tolist()
        assert all(page.total == rows.size for page in pages)
        for one in listed:
            same = np.flatnonzero((made.sequence == one.sequence) & (made.document == one.document))
            near = same[abs(same - one.row) <= 3]
            assert one.context == "".join(f"w{made.token_id[row]} " for row in near)
            assert one.context.token == f"w{token} "
            assert analysis.passage(store, one.document, 0)["row"].values[one.place] == one.row
    assert analysis.token_occurrences(store, 999).total == 0


def test_tokens_are_found_by_their_text(cut):
    made, _, store = cut
    found = analysis.tokens_matching(store, "W1")
    assert found[0].token_id == 1  # the text itself, then what begins with it, the most frequent first
    assert {one.token_id for one in found} == {1, *range(10, 20)}
    rest = [one.occurrences for one in found[1:]]
    assert rest == sorted(rest, reverse=True)
    assert all(one.occurrences == (made.token_id == one.token_id).sum() for one in found)
    assert analysis.tokens_matching(store, ".") == ()
    assert analysis.tokens_matching(store, "") == ()


def test_slices_of_a_shard_are_its_rows_across_row_groups(tmp_path):
    manifest = a_manifest([a_site(0, slots_can_miss=True), a_site(1)], ["routing"])
    rows = 2 * ROW_GROUP + 100
    store = stored(tmp_path / "s", manifest, made_batches(manifest, 1, rows=rows))
    shard, rng = store.shards[0], random.Random(0)
    spans = [(0, 0), (rows, rows), (ROW_GROUP - 1, ROW_GROUP + 1), (0, rows), (2 * ROW_GROUP, rows)]
    for a, b in [*spans, *(sorted(rng.sample(range(rows), 2)) for _ in range(5))]:
        assert shard.tokens(["token_id", "phase"], slice(a, b)).equals(
            shard.tokens(["token_id", "phase"]).slice(a, b - a)
        )
        together = shard.routings(("expert", "valid", "margin"), slice(a, b))
        for key in ("L000", "L001"):
            whole, part = shard.routing(key), shard.routing(key, ["expert"], slice(a, b))
            for name in ("expert", "weight", "entropy", "margin"):
                np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[a:b])
            np.testing.assert_array_equal(together[key].expert, whole.expert[a:b])
            assert whole.valid is None or (together[key].valid == whole.valid[a:b]).all()


def test_bad_questions_are_answered_with_a_sentence(cut):
    store = cut[2]
    for ask, said in (
        (lambda: analysis.passage(store, 99, 0), "no document 99"),
        (lambda: analysis.passage(store, 0, 7), "no MoE layer"),
        (lambda: analysis.passage(store, 0, 0, -1, 3), "there are none"),
        (lambda: analysis.find_documents(store, limit=-1), "page"),
    ):
        with pytest.raises(MoescopeError, match=said):
            ask()


def test_contents_are_forgotten_with_their_store(cut):
    import gc
    import weakref

    store = Store.open(cut[2].path)
    analysis.find_documents(store)
    gone = weakref.ref(contents_of(store))
    del store
    gc.collect()
    assert gone() is None


def test_a_store_deleted_under_its_reader_says_so(cut, tmp_path):
    shutil.copytree(cut[2].path, tmp_path / "s")
    for asked in (
        lambda store: analysis.passage(store, 3, 0),
        lambda store: analysis.find_documents(store),
        lambda store: analysis.token_routing(store, 5),
        lambda store: analysis.token_occurrences(store, 1),
        lambda store: analysis.load(store),
    ):
        first, again = (Store.open(shutil.copytree(tmp_path / "s", tmp_path / name)) for name in ("first", "again"))
        asked(again)
        for store in (first, again):
            shutil.rmtree(store.path)
        with pytest.raises(StoreError):
            asked(first)
        with suppress(StoreError):  # what is held in memory may still be shown; nothing else is raised
            asked(again)
