"""python -m benchmarks.layout runs/encoded/DIGEST [--files N]

What the encoding cache would be as lists of values, split by byte and compressed by zstd, beside binaries as
they are: size by column, and megabytes that one core reads and writes a second, in alternation. Megabytes are
those of the binaries.
"""

import argparse
import io
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage
from ray_jobs.console import show
from ray_jobs.data.encoding.cache_files import read_part
from ray_jobs.data.encoding.tensors import STORED_AS, read_tensors

TURNS = 15


def tensor_names(table: pa.Table) -> list[str]:
    """Names of the columns that hold tensors for training."""
    described = [field for field in table.schema if field.metadata and b"dtype" in field.metadata]
    return [field.name for field in described if field.metadata[b"dtype"].decode() in STORED_AS]


def as_lists(table: pa.Table, names: list[str]) -> pa.Table:
    """Tensor columns as lists of values of a fixed length; bfloat16 as 2-byte values."""
    columns = {}
    for name in names:
        values = read_tensors(table, [name])[name].reshape(len(table), -1)
        plain = values.view(np.float16) if values.dtype == np.uint16 else values
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(plain.ravel()), values.shape[1])
    return pa.table(columns)


def as_binaries(table: pa.Table) -> bytes:
    """A file as the cache has it."""
    content = io.BytesIO()
    pq.write_table(
        table,
        content,
        compression="none",
        use_dictionary=False,
        row_group_size=len(table),
        write_page_checksum=True,
    )
    return content.getvalue()


def split_by_byte(table: pa.Table) -> bytes:
    """A file of lists, each byte of the values by itself, compressed by zstd at its fastest level."""
    content = io.BytesIO()
    leaves = [f"{field.name}.list.element" for field in table.schema if field.type.value_type != pa.bool_()]
    pq.write_table(
        table,
        content,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        use_byte_stream_split=leaves,
        row_group_size=len(table),
        write_page_checksum=True,
        write_statistics=False,
    )
    return content.getvalue()


def read_lists(content: bytes) -> dict[str, np.ndarray]:
    table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    return {
        name: np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[name].chunks])
        for name in table.column_names
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layout", description=__doc__)
    parser.add_argument("folder", help="files of one model's encodings")
    parser.add_argument("--files", type=int, default=6)
    options = parser.parse_args()
    cache = Storage.open(options.folder)
    files = [file for file in cache.files() if file.endswith(".parquet")][: options.files]
    tables = [read_part(cache, file) for file in files]
    names = [name for name in tensor_names(tables[0]) if name != "conditioning"]
    tables = [table.select(names) for table in tables]
    lists = [as_lists(table, names) for table in tables]
    for name in names:
        before = sum(len(as_binaries(table.select([name]))) for table in tables)
        after = sum(len(split_by_byte(table.select([name]))) for table in lists)
        show(f"{name}: {before:,} bytes, 1/{before / after:.2f} as lists")
    binaries, split = [as_binaries(table) for table in tables], [split_by_byte(table) for table in lists]

    def read_binary(content: bytes) -> object:
        return read_tensors(pq.read_table(pa.BufferReader(content), page_checksum_verification=True), names)

    ways: dict[str, Callable[[], object]] = {
        "binaries, read": lambda: [read_binary(content) for content in binaries],
        "lists, read": lambda: [read_lists(content) for content in split],
        "binaries, written": lambda: [as_binaries(table) for table in tables],
        "lists, written": lambda: [split_by_byte(table) for table in lists],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            seconds[name].append(time.process_time() - begin)
    megabytes = sum(map(len, binaries)) / 1e6
    for name, spent in seconds.items():
        show(f"{name}: {megabytes / median(spent):,.0f} MB/s of one core")


if __name__ == "__main__":
    main()
