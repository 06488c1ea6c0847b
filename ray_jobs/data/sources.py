"""Where pictures and captions come from: today the ImageFolder convention, local or in a bucket."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pyarrow.fs

from cluster.storage import Storage
from ray_jobs.config import ConfigError, resolve_path

FIELDS = ("file_name", "text")


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images and `metadata.jsonl`, one JSON object a line with `file_name` and `text`."""

    storage: Storage
    rows: list[dict[str, str]]
    digest: str  # of the captions and of every file's name, size and time of change

    @classmethod
    def open(cls, source: str) -> "ImageFolder":
        """Read the captions; the images themselves stay where they are.

        Raises:
            ConfigError: the folder or its captions are missing, or a line has a wrong field.
        """
        storage = Storage.open(resolve_path(source))
        if storage.filesystem.get_file_info(storage.path).type != pyarrow.fs.FileType.Directory:
            raise ConfigError(
                f"data.source: {source}: no such folder; name one with images and metadata.jsonl"
            )
        if not storage.exists("metadata.jsonl"):
            raise ConfigError(
                f"{source}: has no metadata.jsonl; write one line a picture: "
                '{"file_name": "cat.png", "text": "a cat"}'
            )
        text = storage.read_text("metadata.jsonl")
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        rows = [_parse(f"{source}/metadata.jsonl: line {number}", line) for number, line in lines]
        if not rows:
            raise ConfigError(f"{source}/metadata.jsonl: has no lines; write one a picture")
        listing = storage.filesystem.get_file_info(pyarrow.fs.FileSelector(storage.path, recursive=True))
        files = sorted((info.path, info.size, info.mtime_ns) for info in listing)
        return cls(storage, rows, hashlib.sha256(f"{text}{files}".encode()).hexdigest())


def _parse(where: str, line: str) -> dict[str, str]:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg}); write one object a line") from None
    if not isinstance(row, dict):
        raise ConfigError(f'{where}: not an object; write {{"file_name": ..., "text": ...}}')
    for field in FIELDS:
        if field not in row:
            found = ", ".join(row) or "nothing"
            raise ConfigError(
                f"{where}: field {field!r} is missing (found: {found}); name the fields file_name and text"
            )
        if not isinstance(row[field], str):
            raise ConfigError(f"{where}: field {field!r} must be text, not {row[field]!r}")
    return {field: row[field] for field in FIELDS}
