"""Tensors in Parquet: bit by bit, with shape and dtype in the schema."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ray_jobs.data.encoding.tensors import as_torch, read_tensors, row_bytes, tensor_column


def stored(**tensors: torch.Tensor) -> pa.Table:
    """A table of tensor columns, written and read."""
    columns = [tensor_column(name, tensor) for name, tensor in tensors.items()]
    table = pa.Table.from_arrays([c for _, c in columns], schema=pa.schema([f for f, _ in columns]))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    buffer.seek(0)
    return pq.read_table(buffer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32])
def test_a_tensor_comes_back_bit_by_bit(dtype: torch.dtype) -> None:
    values = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0)) * 1e6
    tensor = values.to(dtype)
    back = as_torch(read_tensors(stored(latents=tensor), ["latents"])["latents"].copy())
    assert back.dtype == dtype and torch.equal(back, tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_several_lengths_come_back_with_zeros_at_their_ends(dtype: torch.dtype) -> None:
    values = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    lengths = [6, 2, 0, 5]
    for row, length in zip(values, lengths, strict=True):
        row[length:] = 0
    field, column = tensor_column("embeds", values, lengths)
    table = pa.table([column], schema=pa.schema([field]))
    size = 3 * values.element_size()
    assert [len(row.as_py()) for row in table["embeds"]] == [length * size for length in lengths]
    assert row_bytes(field) == row_bytes(tensor_column("embeds", values)[0]) == 6 * size
    for order in ([0, 1, 2, 3], [3, 1]):
        taken = pa.concat_tables([table.take(order[:1]), table.take(order[1:])])
        back = as_torch(read_tensors(taken, ["embeds"])["embeds"].copy())
        assert back.dtype == dtype and torch.equal(back, values[order])


def test_bfloat16_keeps_values_that_half_precision_cannot() -> None:
    tensor = torch.tensor([[1e30, -1e-30, float("inf")]], dtype=torch.bfloat16)
    back = as_torch(read_tensors(stored(embeds=tensor), ["embeds"])["embeds"].copy())
    assert torch.equal(back, tensor)


def test_the_schema_names_shape_and_dtype() -> None:
    field = stored(latents=torch.zeros(2, 16, 8, 8, dtype=torch.bfloat16)).schema.field("latents")
    assert field.metadata == {b"shape": b"[16, 8, 8]", b"dtype": b"bfloat16"}
    assert field.type == pa.binary(16 * 8 * 8 * 2)


def test_rows_of_a_slice_and_of_several_chunks_are_read_in_their_order() -> None:
    table = stored(latents=torch.arange(10, dtype=torch.int32).reshape(10, 1))
    parts = pa.concat_tables([table.slice(6, 3), table.slice(1, 2)])
    assert read_tensors(parts, ["latents"])["latents"].ravel().tolist() == [6, 7, 8, 1, 2]
    assert read_tensors(table.slice(4, 2), ["latents"])["latents"].dtype == np.int32
