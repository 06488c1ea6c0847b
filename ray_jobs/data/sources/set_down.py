"""Record batches of a source's pieces, set down in a temporary file, of which a process reads one at a time.

The list of pieces of a large folder then takes some hundred bytes a piece, not those of its rows.
"""

import tempfile
import threading
from collections.abc import Callable

import pyarrow as pa

IN_MEMORY = 16 << 20  # bytes up to which there is no file


class BatchFile:
    """A file that is removed when no batch in it is referred to any more."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema, self._end, self._lock = schema, 0, threading.Lock()
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  closed with its last batch

    def set_down(self, batch: pa.RecordBatch) -> "Batch":
        """Write a batch of the file's schema."""
        content = batch.serialize()
        with self._lock:
            start = self._end
            self._file.seek(start)
            self._file.write(content)
            self._end += len(content)
        return Batch(self, start, len(content))

    def read(self, start: int, length: int) -> bytes:
        with self._lock:
            self._file.seek(start)
            return self._file.read(length)


class Batch:
    """A record batch that was set down; a pickled one holds its content."""

    __slots__ = ("_file", "_length", "_start")

    def __init__(self, file: BatchFile, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length

    def read(self) -> pa.RecordBatch:
        content = pa.py_buffer(self._file.read(self._start, self._length))
        return pa.ipc.read_record_batch(content, self._file.schema)

    def __reduce__(self) -> tuple[Callable[[pa.RecordBatch], "Batch"], tuple[pa.RecordBatch]]:
        return batch_of, (self.read(),)


def batch_of(batch: pa.RecordBatch) -> Batch:
    """Set down a batch in a file of its own."""
    return BatchFile(batch.schema).set_down(batch)
