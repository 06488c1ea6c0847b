"""WebDataset's shards as a source: tar files in which neighbouring members make a sample."""

import json
import tarfile
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from ray_jobs.config import SourceConfig
from ray_jobs.data.images import Rejected
from ray_jobs.data.samples import (
    PICTURE_SUFFIXES,
    Listing,
    Piece,
    Sample,
    Source,
    broken_sample,
    check_caption,
    decode_caption,
    fingerprint,
    legible,
)

BUFFER = 4 << 20  # bytes that are asked for at once
DEFAULT_CAPTION = SourceConfig.model_fields["caption_column"].default
OTHER_CAPTION = "caption"  # what img2dataset calls it


@dataclass(frozen=True)
class Shard(Piece):
    """A tar file."""

    file: str


class _Header(tarfile.TarInfo):
    """A header that is damaged or missing is an error; `tarfile` alone takes it for the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed leaves it out
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or cut off: {error}") from None


Parts = dict[str, tuple[str, bytes]]  # "picture", "txt", "json" -> the member's name and content


@dataclass(frozen=True)
class Tars(Source):
    """WebDataset's shards: tar files in which consecutive members with the same key make a sample.

    The key is the path up to the first dot of the base name; what follows is the extension: one of
    PICTURE_SUFFIXES, .txt (the caption) and .json (an object). The caption is the .txt, unless
    `caption_column` names a key of the .json; without a .txt it is the json's "text" or "caption".
    """

    filesystem: fs.FileSystem
    folder: str
    caption_column: str
    stratify: str | None

    def read(self, piece: Piece, wanted: Container[int] | None = None) -> Iterator[Sample]:
        """Of a damaged tar: what precedes the damage, and then one sample with problem `broken_shard`."""
        assert isinstance(piece, Shard)
        last = max(wanted, default=-1) if isinstance(wanted, Collection) else None
        row = 0
        try:
            for parts in self._groups(piece, lambda number: wanted is None or number in wanted):
                if wanted is None or row in wanted:
                    yield self._sample(piece, row, parts)
                row += 1
                if last is not None and row > last:
                    return
        except (tarfile.TarError, OSError) as error:
            if wanted is None or row in wanted:
                yield broken_sample(piece, row, f"{piece.file}: after {row} samples", error)

    def _groups(self, piece: Shard, keep: Callable[[int], bool]) -> Iterator[Parts]:
        """The samples' parts in order; content is b"" where `keep(row)` is false."""
        row, key, parts = 0, "", Parts()
        path = f"{self.folder}/{piece.file}"
        try:
            with (
                self.filesystem.open_input_stream(path, compression=None, buffer_size=BUFFER) as stream,
                tarfile.open(fileobj=stream, mode="r|", bufsize=BUFFER, tarinfo=_Header) as tar,
            ):
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                    its_key, kind = _key_and_kind(member)
                    if not kind:
                        continue
                    if parts and its_key != key:
                        yield parts
                        row, parts = row + 1, Parts()
                    key = its_key
                    if kind not in parts:
                        file = tar.extractfile(member)
                        assert file, "only regular files are parts"
                        parts[kind] = (member.name, file.read() if keep(row) else b"")
        except (tarfile.TarError, OSError):
            if "picture" in parts and len(parts) > 1:
                yield parts
            raise
        if parts:
            yield parts

    def _sample(self, piece: Shard, row: int, parts: Parts) -> Sample:
        text, data, stratum, problem = "", b"", "", None
        name, data = parts.get("picture", next(iter(parts.values())))
        try:
            fields = _object(*parts["json"]) if "json" in parts else {}
            value = fields.get(self.stratify) if self.stratify else None
            stratum = "" if value is None else legible(str(value))
            text = self._caption(parts, fields)
            if "picture" not in parts:
                raise Rejected("missing_file", f"no picture beside {name}")
        except Rejected as rejected:
            data, problem = b"", rejected.with_traceback(None)
        return Sample(row, legible(f"{piece.file}: {name}"), text, data, stratum, "instance", problem)

    def _caption(self, parts: Parts, fields: dict[str, Any]) -> str:
        if "txt" in parts and (self.caption_column == DEFAULT_CAPTION or "json" not in parts):
            return decode_caption(parts["txt"][1])
        keys = [self.caption_column] + [OTHER_CAPTION] * (self.caption_column == DEFAULT_CAPTION)
        text = next((fields[key] for key in keys if key in fields), None)
        if text is not None and not isinstance(text, str):
            raise Rejected("missing_caption", f"the caption is no text but {type(text).__name__}")
        if text is not None and text != legible(text):
            raise Rejected("caption_not_utf8", "the text has half a surrogate pair")
        return check_caption(text)


def _key_and_kind(member: tarfile.TarInfo) -> tuple[str, str]:
    """The sample that a member belongs to and what it is of it; "" if it is nothing of a sample."""
    folder, slash, base = member.name.rpartition("/")
    stem, _, extension = base.partition(".")
    kind = extension.lower()
    kind = "picture" if f".{kind}" in PICTURE_SUFFIXES else kind
    is_part = stem and member.isreg() and kind in ("picture", "txt", "json")
    return folder + slash + stem, kind if is_part else ""


def _object(name: str, content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Rejected("caption_not_utf8", f"{name} is not UTF-8") from None
    except ValueError as error:
        raise Rejected("missing_caption", f"{name} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Rejected("missing_caption", f"{name} is not a JSON object")
    return fields


def open_tars(listing: Listing, files: list[str], config: SourceConfig, stratify: str | None) -> Tars:
    """List the shards; what they hold, only reading tells."""
    columns = (config.caption_column, stratify)
    pieces: list[Piece] = [
        Shard(number, name, fingerprint("tar", listing.folder, name, listing.files[name], columns), name)
        for number, name in enumerate(files)
    ]
    return Tars(listing.name, None, pieces, listing.filesystem, listing.folder, *columns)
