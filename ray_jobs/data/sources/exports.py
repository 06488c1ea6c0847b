"""What exports of annotation tools have in common: pictures by their paths or URLs, with captions by name."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from pydantic import BaseModel, ValidationError

from ray_jobs.config import ConfigError
from ray_jobs.config.fields import explain
from ray_jobs.data.sources.listing import Stamp

# Label Studio puts a random prefix before the name of an uploaded file.
UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")

Entry = TypeVar("Entry", bound=BaseModel)


@dataclass(frozen=True)
class Labelled:
    """A picture in an export.

    Attributes:
        place: file and number of its entry, for messages.
        references: paths or URLs under which it may be found, the surest first.
        captions: its captions, by the name of the field in which they were written.
        values: other values, by name.
        kinds: kinds of its annotations, for messages.
    """

    place: str
    references: tuple[str, ...]
    captions: Mapping[str, list[str]]
    values: Mapping[str, str]
    kinds: tuple[str, ...]


def validated(model: type[Entry], entry: dict[str, Any], place: str, fix: str) -> Entry:
    """Return an entry of an export as `model`; raise ConfigError, with `fix`, if it has another form."""
    try:
        return model.model_validate(entry)
    except ValidationError as error:
        found = ", ".join(entry) or "nothing"
        raise ConfigError(f"{explain(error, place)} (found: {found}); {fix}") from None


def read_entries(where: str, content: bytes) -> list[dict[str, Any]]:
    """Read the objects of a JSON array, or of lines of JSON.

    Raises:
        ConfigError: the file is neither.
    """
    try:
        text = content.decode("utf-8-sig")
        entries = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: byte {error.start} is not UTF-8; export it again") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}: line {error.lineno}: not JSON ({error.msg}); give Label Studio's JSON export, or "
            "Labelbox's NDJSON export"
        ) from None
    if not entries:
        raise ConfigError(f"{where}: has no entries; export a project with pictures")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: entry {number}: not an object; export it again")
    return entries


def _lines(text: str) -> list[Any]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                error.lineno = number
                raise
    return found


def picture_path(reference: str) -> str:
    """Return the path in a reference to a picture: of a URL its path, of Label Studio's local files `d`."""
    if "://" not in reference and not reference.startswith("/data/"):
        return reference
    parts = urlsplit(reference)
    below = parse_qs(parts.query).get("d")
    return below[0] if below and parts.path.rstrip("/").endswith("/local-files") else unquote(parts.path)


class PictureNames:
    """Find the files of a folder to which paths and URLs lead."""

    def __init__(self, files: Mapping[str, Stamp]) -> None:
        self._files = files
        self._named: dict[str, list[str]] = {}
        for name in files:
            self._named.setdefault(name.rsplit("/", 1)[-1], []).append(name)

    def find(self, references: tuple[str, ...]) -> str | None:
        """Return the file with the longest ending in common with the first reference that has any.

        So a folder may have been moved, or be named from a root above it. A reference to an upload, whose
        folder is Label Studio's own, leads to the only file of that name.
        """
        for reference in references:
            parts = [part for part in picture_path(reference).replace("\\", "/").split("/") if part]
            for start in range(len(parts)):
                if (name := "/".join(parts[start:])) in self._files:
                    return name
            uploaded = UPLOADED.fullmatch(parts[-1]) if parts else None
            same = self._named.get(uploaded[1], []) if uploaded else []
            if len(same) == 1:
                return same[0]
        return None
