"""SQL over a store agrees with the arrays, and cannot leave the store."""

import numpy as np
import pytest

from moescope.errors import StoreError
from moescope.store import Batch, Store, StoreWriter

from .made import a_manifest, a_site, made_batches


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three shards, one site with missing slots, one with many experts."""
    sites = [a_site(1, 8, 2, slots_can_miss=True), a_site(3, 300, 3, weight_dtype="bfloat16")]
    manifest = a_manifest(sites, settings={"shard_tokens": 50}, labels=["domain", 'odd "name"; drop table tokens --'])
    folder = tmp_path_factory.mktemp("sql") / "it's a store"
    with StoreWriter.create(folder, manifest) as writer:
        for batch in made_batches(manifest, 8):
            writer.append(batch)
    return Store.open(folder)


def test_routing_is_the_arrays_in_long_form(store):
    table = store.sql("select * from routing order by layer, sequence, position, rank")
    at = 0
    for site in store.sites:
        routing = store.routing(site.key)
        valid = np.ones(routing.expert.shape, bool) if routing.valid is None else routing.valid
        part = table.iloc[at : at + routing.expert.size]
        at += len(part)
        assert (part["layer"] == site.layer).all()
        np.testing.assert_array_equal(part["rank"], np.tile(np.arange(site.top_k), store.n_tokens))
        np.testing.assert_array_equal(part["expert"].isna(), ~valid.ravel())
        np.testing.assert_array_equal(part["expert"][valid.ravel()], routing.expert[valid])
        np.testing.assert_array_equal(part["weight"][valid.ravel()], routing.weight[valid])
        np.testing.assert_array_equal(part["document"], np.repeat(store.tokens()["document"].to_numpy(), site.top_k))
    assert at == len(table)


def test_load_counts_selections(store):
    table = store.sql("select layer, expert, n, weight from load")
    assert len(table) == 308
    direct = store.sql("select layer, expert, count(*) as n, sum(weight) as weight from routing group by all")
    merged = table.merge(direct.dropna(), on=["layer", "expert"], suffixes=("", "_direct"))
    assert merged["n"].sum() == table["n"].sum() == direct.dropna()["n"].sum()
    np.testing.assert_array_equal(merged["n"], merged["n_direct"])
    np.testing.assert_allclose(merged["weight"], merged["weight_direct"], rtol=1e-6)


def test_scores_and_small_tables(store):
    scores = store.sql("select layer, entropy from scores where layer = 3 order by sequence, position")
    np.testing.assert_array_equal(scores["entropy"], store.routing(3).entropy)
    assert store.sql("select site, n_experts from sites").values.tolist() == [["L001", 8], ["L003", 300]]
    assert store.sql("select count(*) as n from outliers")["n"][0] == store.outliers().num_rows
    assert store.sql("select max(absmax) as top from hidden_outliers")["top"][0] == 5
    assert dict(store.sql("select token_id, text from vocabulary").values.tolist()) == store.vocabulary()


def test_a_joined_question(store):
    answer = store.sql("""
        with top as (select * from routing where rank = 0 and layer = 3)
        select d.domain, t.phase, count(*) as n
        from top join tokens t using (document, sequence, position) join documents d using (document)
        group by all order by all
    """)
    documents = {row["document"]: row["domain"] for row in store.documents().to_pylist()}
    table = store.tokens().to_pylist()
    for domain, phase, n in answer.itertuples(index=False):
        same = [r for r in table if documents[r["document"]] == (None if domain != domain else domain)]
        assert n == sum(r["phase"] == phase for r in same)
    assert answer["n"].sum() == store.n_tokens


def test_only_what_a_query_names_is_decoded(store, monkeypatch):
    from moescope.store.shard import Shard

    read = set()
    original = Shard.table

    def noted(self, name, columns=None, rows=None):
        read.update(columns or [name])
        return original(self, name, columns, rows)

    monkeypatch.setattr(Shard, "table", noted)
    store.sql("select count(*) from sites")
    assert read == set()
    store.sql("select expert, count(*) from routing where layer = 3 group by expert")
    assert {name for name in read if name.startswith("L")} == {"L003.expert", "L003.weight"}


@pytest.mark.parametrize(
    "query",
    [
        "select * from '/etc/passwd'",
        "select * from read_text('/etc/passwd')",
        "select * from read_csv('/etc/passwd')",
        "select * from read_blob('{folder}/manifest.json')",
        "select * from read_parquet('{folder}/shards/00000/tokens.parquet')",
        "select * from glob('/*')",
        "select * from read_parquet('https://example.com/x.parquet')",
        "copy tokens to '{folder}/x.csv'",
        "copy tokens to '{folder}/shards/00000/tokens.parquet'",
        "export database '{folder}/out'",
        "attach '{folder}/x.db'",
        "install httpfs",
        "load httpfs",
        "set enable_external_access = true",
        "reset lock_configuration",
        "set temp_directory = '/tmp'",
        "create table x as select 1",
        "create secret s (type s3)",
        "drop view routing",
        "insert into vocabulary values (1, 'x')",
        "call pragma_version()",
        "select 1; drop view routing",
        "select 1; select 2",
        "explain analyze copy tokens to '{folder}/x.csv'",
        "explain copy tokens to '{folder}/x.csv'",
        "with x as (copy tokens to '{folder}/x.csv') select * from x",
        "prepare p as select 1",
        "select * from secret_rows",
        "select getenv('HOME')",
        "",
        "selec 1",
    ],
)
def test_nothing_outside_can_be_reached(store, query):
    secret_rows = store.tokens()  # a variable of the caller's, which DuckDB could otherwise find by name
    assert secret_rows is not None
    before = sorted((p, p.stat().st_mtime_ns) for p in store.path.rglob("*"))
    with pytest.raises(StoreError) as caught:
        store.sql(query.format(folder=str(store.path).replace("'", "''")))
    assert "\n" not in str(caught.value)
    assert sorted((p, p.stat().st_mtime_ns) for p in store.path.rglob("*")) == before
    assert store.check() == []


def test_settings_are_locked_even_from_a_select(store):
    """Functions that a SELECT may call do not change settings or see other databases."""
    allowed = store.sql(
        "select current_setting('enable_external_access') as a, current_setting('lock_configuration') as l"
    )
    assert allowed.astype(bool).values.tolist() == [[False, True]]
    with pytest.raises(StoreError):
        store.sql("select set_config('enable_external_access', 'true', false)")


def test_hostile_labels_and_texts_are_only_data(store):
    name = store.labels[1].replace('"', '""')
    found = store.sql(f'select "{name}" as odd from documents order by document')
    assert found["odd"].tolist()[:2] == ["law", "code"]


def test_an_error_names_the_tables(store):
    with pytest.raises(StoreError, match="tokens"):
        store.sql("select * from token")
    with pytest.raises(StoreError, match="weight"):
        store.sql("select wieght from routing")


def test_a_store_without_routing_has_no_routing_view(tmp_path):
    manifest = a_manifest(tiers=["logits"])
    (batch,) = made_batches(manifest, 1)
    with StoreWriter.create(tmp_path / "s", manifest) as writer:
        writer.append(Batch(batch.tokens, batch.documents, batch.vocabulary, batch.sites))
    with pytest.raises(StoreError, match="routing does not exist"):
        Store.open(tmp_path / "s").sql("select * from routing")
