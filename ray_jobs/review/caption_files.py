"""Files of captions in JSON Lines, of which single lines are replaced."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.storage import Storage
from ray_jobs.config import ConfigError


class Changed(ConfigError):
    """A file is another one than was read; what was read must be read again before anything is written."""


class CaptionFile:
    """A JSON Lines file as it was read; it need not exist.

    Raises:
        json.JSONDecodeError: a line is not JSON.
    """

    def __init__(self, folder: Storage, name: str) -> None:
        self.folder, self.name = folder, name
        self._content = self._read()
        # Not at other line ends: a caption may hold U+2028. Bytes that are not UTF-8 stay as they are.
        text = (self._content or b"").decode("utf-8-sig", errors="surrogateescape")
        self._lines = text.split("\n")
        self._places = [number for number, line in enumerate(self._lines) if line.strip()]
        self.rows: list[dict[str, Any]] = [json.loads(self._lines[place]) for place in self._places]

    def _read(self) -> bytes | None:
        return self.folder.read_bytes(self.name) if self.folder.exists(self.name) else None

    @property
    def address(self) -> str:
        return f"{self.folder.uri}/{self.name}"

    @property
    def is_current(self) -> bool:
        return self._read() == self._content

    def replace(self, number: int, row: Mapping[str, Any]) -> None:
        """Write the file with another row `number`, or with one more at the end.

        Raises:
            Changed: the file is no longer as it was read; nothing is written.
        """
        lines, line = list(self._lines), json.dumps(row, ensure_ascii=False)
        if number == len(self.rows):
            place = self._places[-1] + 1 if self._places else 0
            lines.insert(place, line)
            self._write(lines)
            self._places.append(place)
            self.rows.append(dict(row))
        else:
            lines[self._places[number]] = line
            self._write(lines)
            self.rows[number] = dict(row)

    def create(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a file that does not exist yet.

        Raises:
            Changed: it exists.
        """
        assert self._content is None
        self._write([*(json.dumps(row, ensure_ascii=False) for row in rows), ""])
        self._places, self.rows = list(range(len(rows))), [dict(row) for row in rows]

    def _write(self, lines: list[str]) -> None:
        if not self.is_current:
            raise Changed(
                f"{self.address} was changed meanwhile; reload the page, and edit the caption again"
            )
        if lines[-1]:
            lines.append("")
        content = "\n".join(lines).encode("utf-8", errors="surrogateescape")
        self.folder.write_bytes(self.name, content)
        self._content, self._lines = content, lines
