"""Files of the encoding cache: Parquet with a checksum a page, so that damage is found where it is read."""

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage


def write_part(cache: Storage, file: str, table: pa.Table) -> None:
    """Write rows as one file of the cache, whole or not at all."""
    buffer = io.BytesIO()
    # Latents and embeddings hardly compress; uncompressed they are read without a copy.
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
    """Rows of a file of the cache; columns: None takes all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged; names it, and what to do.
    """
    with cache.open_input(file) as opened:
        try:
            names = None if columns is None else list(columns)
            return pq.read_table(opened, columns=names, page_checksum_verification=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"{cache.uri}/{file}: damaged: {' '.join(str(error).split())}; delete it and start the run "
                "again: prepare encodes it anew"
            ) from None
