"""Files of the encoding cache: Parquet with a checksum per page, so that damage is detected on reading.

A damaged file is moved aside, and its reader fails with a message. The next prepare encodes it anew.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage

ASIDE = ".damaged"


def write_part(cache: Storage, file: str, table: pa.Table) -> None:
    """Write rows as one file of the cache, whole or not at all."""
    buffer = io.BytesIO()
    # Uncompressed columns are read without a copy. As columns of 2-byte values, with BYTE_STREAM_SPLIT and
    # zstd, latents and embeddings would take 1/2 to 2/3 of the space.
    pq.write_table(
        table,
        buffer,
        compression="none",
        use_dictionary=False,
        row_group_size=len(table),
        write_page_checksum=True,
    )
    cache.write_bytes(file, buffer.getvalue())


def read_part(cache: Storage, file: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read rows of a cache file; `columns` None reads all.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedPart: the file is damaged, and has been moved aside.
    """
    names = None if columns is None else list(columns)
    return _read(
        cache, file, lambda opened: pq.read_table(opened, columns=names, page_checksum_verification=True)
    )


def read_schema(cache: Storage, file: str) -> pa.Schema:
    """Read the schema of a cache file; errors as for `read_part`."""
    return _read(cache, file, pq.read_schema)


class DamagedPart(ValueError):
    """Error for a damaged cache file; it names the file and the fix. `damage_message` recognises its text."""


def aside(cache: Storage, file: str) -> DamagedPart | None:
    """Return the error for a file that was moved aside; None if it was not."""
    if not cache.exists(file + ASIDE):
        return None
    return DamagedPart(
        f"an encoded file is damaged: {cache.uri}/{file} was renamed to {file[:8]}...{ASIDE}; run the same "
        "command again to encode it anew"
    )


def _read(cache: Storage, file: str, read: Callable[[Any], Any]) -> Any:
    try:
        try:
            with cache.open_input(file) as opened:
                return read(opened)
        except (OSError, pa.ArrowInvalid) as error:
            if isinstance(error, FileNotFoundError):
                raise
            content = cache.read_bytes(file)  # the store may have failed, not the content
        try:
            return read(pa.BufferReader(content))
        except (OSError, pa.ArrowInvalid):
            cache.rename(file, file + ASIDE)
            raise FileNotFoundError(file) from None
    except FileNotFoundError:
        if damage := aside(cache, file):
            raise damage from None
        raise
