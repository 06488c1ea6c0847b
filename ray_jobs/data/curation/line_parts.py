"""Lists of lines that grow with a dataset: one file, or above a size the parts of a folder."""

import json
from collections.abc import Iterator
from typing import Any

from cluster.storage import Storage
from ray_jobs.config import ConfigError

REJECTED, DUPLICATES = "rejected.jsonl", "duplicates.jsonl"
BYTES_A_PART = 64 << 20  # above which a list is a folder


class LineParts:
    """Writer of a list: `name`, or `name`/00000.jsonl and so on in the folder of its stem.

    A list that is written again replaces the former one, of either form, when it is closed.
    """

    def __init__(self, storage: Storage, name: str, bytes_a_part: int = BYTES_A_PART) -> None:
        self.storage, self.name, self.bytes_a_part = storage, name, bytes_a_part
        self.folder = storage.child(folder_of(name))
        self._texts, self._size, self._parts = list[str](), 0, list[str]()

    def write(self, text: str) -> None:
        """Add whole lines."""
        self._texts.append(text)
        self._size += len(text)
        if self._size > self.bytes_a_part:
            self._end_part()

    def close(self) -> None:
        """Write what remains, and remove the former list."""
        if not self._parts:
            self.storage.write_text(self.name, "".join(self._texts))
            self.storage.delete(folder_of(self.name))
            return
        if self._size:
            self._end_part()
        for file in set(self.folder.files()) - set(self._parts):
            self.folder.delete(file)
        self.storage.delete(self.name)

    def _end_part(self) -> None:
        part = f"{len(self._parts):05d}.jsonl"
        self.folder.write_text(part, "".join(self._texts))
        self._parts.append(part)
        self._texts, self._size = [], 0


def folder_of(name: str) -> str:
    """Return the folder of a list's parts."""
    return name.removesuffix(".jsonl")


def read_lines(storage: Storage, name: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of a list, of either form; none if there is no such list.

    Raises:
        ConfigError: a line is damaged.
    """
    folder = storage.child(folder_of(name))
    files = [(storage, name)] if storage.exists(name) else [(folder, file) for file in folder.files()]
    for place, file in files:
        # Not at other line ends: a name or a caption may hold U+2028.
        for number, line in enumerate(place.read_text(file).split("\n"), 1):
            if not line:
                continue
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError) as error:
                raise ConfigError(
                    f"{place.uri}/{file}, line {number}: damaged ({error}); run prepare again"
                ) from None
