"""Merged maxima equal those over everything at once, in any grouping."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.store.outliers import ExpertMaxima, HiddenMaximum, OutlierBatch, OutlierMaxima, merged_tables

LAYERS = {"L001": 1, "L004": 4}


def routed_rows(seed, n_batches, n_experts):
    """Batches of rows (expert, output maximum, input maximum, document, position, token id), per site."""
    rng = np.random.default_rng(seed)
    return [
        {
            key: [
                (
                    int(rng.integers(0, n_experts)),
                    float(rng.integers(1, 5)),
                    float(rng.integers(1, 5)),
                    number,
                    row,
                    int(rng.integers(0, 9)),
                )
                for row in range(int(rng.integers(0, 12)))
            ]
            for key in LAYERS
        }
        for number in range(n_batches)
    ]


def batch_maxima(rows, n_experts):
    """What a capture hands over for one batch, row by row."""
    names = ("absmax_out", "document", "position", "token_id", "absmax_in", "first_row_max", "tokens")
    out = {name: np.zeros(n_experts, np.float32 if "max" in name else np.int64) for name in names}
    for expert, largest, into, document, position, token in rows:
        if out["tokens"][expert] == 0:
            out["first_row_max"][expert] = largest
        if out["tokens"][expert] == 0 or largest > out["absmax_out"][expert]:
            place = {"absmax_out": largest, "document": document, "position": position, "token_id": token}
            for name, value in place.items():
                out[name][expert] = value
        out["absmax_in"][expert] = max(out["absmax_in"][expert], into)
        out["tokens"][expert] += 1
    return ExpertMaxima(**out)


def brute_force(batches, n_experts):
    """The table's rows from all rows at once."""
    table = []
    for key, layer in LAYERS.items():
        rows = [row for batch in batches for row in batch[key]]
        for expert in range(n_experts):
            mine = [row for row in rows if row[0] == expert]
            if not mine:
                values = dict.fromkeys(("absmax_out", "document", "position", "token_id", "absmax_in", "first_row_max"))
            else:
                top = max(mine, key=lambda row: row[1])  # the first of equals
                first = [next((row[1] for row in batch[key] if row[0] == expert), None) for batch in batches]
                values = {
                    "absmax_out": top[1],
                    "document": top[3],
                    "position": top[4],
                    "token_id": top[5],
                    "absmax_in": max(row[2] for row in mine),
                    "first_row_max": max(value for value in first if value is not None),
                }
            table.append({"site": key, "layer": layer, "expert": expert, **values, "tokens": len(mine)})
    return table


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 9), st.lists(st.integers(1, 6), max_size=3))
def test_merged_maxima_equal_brute_force(seed, n_batches, n_experts, cuts):
    batches = routed_rows(seed, n_batches, n_experts)
    hidden = [HiddenMaximum(float(number % 3), number, number, number, number) for number in range(n_batches)]
    shards, start = [], 0
    for stop in [*sorted(cuts), n_batches]:
        shard = OutlierMaxima()
        for number in range(start, min(stop, n_batches)):
            experts = {key: batch_maxima(batches[number][key], n_experts) for key in LAYERS}
            shard.add(OutlierBatch(experts, {0: hidden[number]}))
        shards.append(shard.tables(LAYERS))
        start = max(start, min(stop, n_batches))
    experts, maxima = merged_tables(shards, LAYERS)
    assert experts.to_pylist() == brute_force(batches, n_experts)
    top = max(hidden, key=lambda one: one.absmax)
    assert maxima.to_pylist() == [{"layer": 0, **vars(top)}]


def test_not_a_number_never_hides_a_maximum():
    def one(value, document):
        place = np.array([document])
        arrays = np.array([value], np.float32)
        return OutlierBatch({"L001": ExpertMaxima(arrays, place, place, place, arrays, arrays, np.array([1]))})

    for order in ([np.nan, 2.0], [2.0, np.nan]):
        total = OutlierMaxima()
        for number, value in enumerate(order):
            total.add(one(value, number))
        (row,) = total.tables({"L001": 1})[0].to_pylist()
        assert row["absmax_out"] == 2.0
        assert row["document"] == order.index(2.0)
        assert row["absmax_in"] == 2.0
        assert row["tokens"] == 2
