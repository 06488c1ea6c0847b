"""Index files of pictures that do not exist."""

import io
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage
from ray_jobs.data.curation.scan import SCHEMA, Entry
from ray_jobs.data.sources.samples import Piece

READABLE: dict[str, object] = {
    **{"role": "instance", "text": "", "stratum": "", "repaired": False, "lines": 1},
    **{"reason": "", "detail": "", "digest": "0" * 64, "width": 64, "height": 64, "sharpness": 500.0},
    **{"contrast": 50.0, "dark": 0.1, "bright": 0.1, "hash": 0, "colours": bytes(48), "further": []},
    "references": [],
}


def write_rows(index: Storage, file: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Write an index file; what a row leaves out is that of a picture that can be used."""
    named = [{"row": number, "name": f"{file} {number}"} for number in range(len(rows))]
    whole = [READABLE | name | dict(row) for name, row in zip(named, rows, strict=True)]
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(whole, schema=SCHEMA), content)
    index.write_bytes(file, content.getvalue())


def indexed(file: str, source: int = 0) -> Entry:
    """Entry of an index file, of which no piece is read."""
    return Entry(source, Piece(0, file, file), file)
