"""Fixed-width columns: bytes out are bytes in, and any Parquet reader gets the same."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moescope.store.columns import id_dtype, missing_id, pack_mask, pack_rows, unpack_mask, unpack_rows, widen

from .compare import exact_float32


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.float16, np.float32]), st.tuples(st.integers(0, 9), st.integers(1, 7))
    )
)
def test_rows_come_back_bit_for_bit(values):
    column = pa.chunked_array([pack_rows(values)])
    back = unpack_rows(column, values.dtype, values.shape[1])
    assert back.tobytes() == values.tobytes()
    assert back.shape == values.shape


def test_sliced_and_chunked_columns_keep_their_rows():
    values = np.arange(60, dtype=np.uint16).reshape(20, 3)
    packed = pack_rows(values)
    pieces = pa.chunked_array([packed.slice(2, 5), packed.slice(11, 4)])
    np.testing.assert_array_equal(unpack_rows(pieces, values.dtype, 3), np.concatenate([values[2:7], values[11:15]]))


def test_one_chunk_is_a_view_without_a_copy():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    packed = pack_rows(values)
    view = unpack_rows(pa.chunked_array([packed]), values.dtype, 3)
    assert np.shares_memory(view, values)
    assert widen(view, "float32") is view


def test_rows_of_another_width_are_refused():
    with pytest.raises(ValueError, match="rows of 4 bytes"):
        unpack_rows(pa.chunked_array([pack_rows(np.zeros((2, 3), np.uint8))]), np.dtype("u1"), 4)


@given(hnp.arrays(bool, st.tuples(st.integers(0, 9), st.integers(1, 20))))
def test_masks_come_back(valid):
    np.testing.assert_array_equal(unpack_mask(pack_mask(valid), valid.shape[1]), valid)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_finite_half_widens_exactly(name):
    bits = np.arange(65_536, dtype=np.uint16)
    values = bits if name == "bfloat16" else bits.view(np.float16)
    finite = np.isfinite(exact_float32(values, name))
    got = widen(values, name)
    assert got.dtype == np.float32
    assert got[finite].tobytes() == exact_float32(values, name)[finite].tobytes()


def test_bfloat16_agrees_with_torch():
    torch = pytest.importorskip("torch")
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    bits = values.view(torch.uint16).numpy()
    np.testing.assert_array_equal(widen(bits, "bfloat16"), values.float().numpy())


@pytest.mark.parametrize(
    ("n_experts", "can_miss", "wanted"),
    [(1, False, "uint8"), (256, False, "uint8"), (255, True, "uint8"), (256, True, "uint16"), (257, False, "uint16")],
)
def test_the_id_type_leaves_room_for_a_missing_id(n_experts, can_miss, wanted):
    name = id_dtype(n_experts, can_miss)
    assert name == wanted
    if can_miss:
        assert missing_id(name) >= n_experts


def test_any_parquet_reader_sees_plain_little_endian_numbers(tmp_path):
    values = np.array([[1.5, -2.0], [3.25, 0.0]], np.float32)
    pq.write_table(pa.table({"w": pack_rows(values)}), tmp_path / "w.parquet")
    rows = pq.read_table(tmp_path / "w.parquet")["w"].to_pylist()
    assert [np.frombuffer(row, "<f4").tolist() for row in rows] == values.tolist()
