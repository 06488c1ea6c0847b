"""Tensors as Parquet columns: binary of a fixed size, with shape and dtype in the field's metadata.

Rows that end in zeros, as captions that are padded, may be stored without these: binary of any size.

Any Parquet reader can decode them, and bfloat16, which Arrow does not support, is preserved bit by bit.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import torch

# NumPy type that holds the bits of each dtype.
STORED_AS = {
    "bfloat16": np.uint16,
    "float32": np.float32,
    "int32": np.int32,
    "uint8": np.uint8,
    "bool": np.bool_,
}


def tensor_column(
    name: str, tensor: "torch.Tensor", lengths: Sequence[int] | None = None
) -> tuple[pa.Field, pa.Array]:
    """Convert a tensor (N x ...) of a dtype in STORED_AS to a column, one row per element of dimension 0.

    Args:
        lengths: N, of each row along dimension 1; what follows is zero, and is not stored. None stores all.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    assert dtype in STORED_AS, dtype
    shape = list(tensor.shape[1:])
    width = int(np.prod(shape)) * np.dtype(STORED_AS[dtype]).itemsize
    metadata = {"shape": json.dumps(shape), "dtype": dtype}
    if lengths is not None:
        field = pa.field(name, pa.large_binary(), False, metadata)
        rows = [as_numpy(row[:length]).tobytes() for row, length in zip(tensor, lengths, strict=True)]
        return field, pa.array(rows, field.type)
    field = pa.field(name, pa.binary(width), False, metadata)
    return field, pa.FixedSizeBinaryArray.from_buffers(
        field.type, len(tensor), [None, pa.py_buffer(as_numpy(tensor).tobytes())]
    )


def read_tensors(table: pa.Table, names: list[str]) -> dict[str, np.ndarray]:
    """Read tensor columns of a table: N x ... in the dtype of STORED_AS (bfloat16 bits as uint16)."""
    return {name: _read(table, name) for name in names}


def row_bytes(field: pa.Field) -> int:
    """Return the bytes of a row of a tensor column in memory."""
    shape, dtype = _layout(field)
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


def _layout(field: pa.Field) -> tuple[list[int], Any]:
    """Return the shape of a tensor column's rows, and the NumPy type that holds them."""
    return json.loads(field.metadata[b"shape"]), STORED_AS[field.metadata[b"dtype"].decode()]


def _read(table: pa.Table, name: str) -> np.ndarray:
    field = table.schema.field(name)
    shape, dtype = _layout(field)
    if field.type == pa.large_binary():
        padded = np.zeros((len(table), *shape), dtype)
        for row, stored in zip(padded, table[name], strict=True):
            values = np.frombuffer(stored.as_buffer(), dtype).reshape(-1, *shape[1:])
            row[: len(values)] = values
        return padded
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8)[
            chunk.offset * chunk.type.byte_width : (chunk.offset + len(chunk)) * chunk.type.byte_width
        ]
        for chunk in table[name].chunks
    ]
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return values.view(dtype).reshape(-1, *shape)


def as_numpy(tensor: "torch.Tensor") -> np.ndarray:
    """Convert a tensor of a dtype in STORED_AS to the array that holds its bits, in contiguous order."""
    import torch

    plain = tensor.contiguous()
    return (plain.view(torch.uint16) if tensor.dtype == torch.bfloat16 else plain).numpy()


def as_torch(values: np.ndarray) -> "torch.Tensor":
    """Convert an array from `read_tensors` to a tensor of its own dtype; shares memory."""
    import torch

    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if values.dtype == np.uint16 else tensor
