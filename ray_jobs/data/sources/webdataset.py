"""WebDataset shards as a source: tar files in which consecutive members form a sample."""

import json
import tarfile
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass

from pyarrow import fs

from ray_jobs.config import ConfigError, SourceConfig
from ray_jobs.data.sources.listing import Listing
from ray_jobs.data.sources.members import Group, Grouping
from ray_jobs.data.sources.samples import (
    Piece,
    Sample,
    Source,
    broken_sample,
    check_caption,
    decode_caption,
    fingerprint,
    incomplete,
    last_wanted,
    legible,
    no_pictures,
)
from ray_jobs.data.sources.tables import caption_column
from ray_jobs.pictures.reading import Rejected

BUFFER = 4 << 20  # bytes per read


@dataclass(frozen=True)
class Shard(Piece):
    """A tar file."""

    file: str


class _Header(tarfile.TarInfo):
    """Tar header that raises an error if damaged or missing; `tarfile` alone treats it as the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed leaves it out
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or cut off: {error}") from None


@dataclass(frozen=True)
class WebDataset(Source):
    """WebDataset shards: tar files whose members are grouped into samples by `members`.

    The caption is the .txt, unless `caption_column` names a key of the .json; without a .txt it is the JSON's
    "text" or "caption".
    """

    filesystem: fs.FileSystem
    folder: str
    caption_column: str | None
    stratify: str | None

    def _read(self, piece: Piece, wanted: Container[int] | None) -> Iterator[Sample]:
        """Yield samples; for a damaged tar those before the damage, then one with problem `broken_shard`."""
        assert isinstance(piece, Shard)
        last = last_wanted(wanted)
        if last == -1:
            return
        row, others = 0, Counter[str]()
        try:
            for group in self._groups(piece, others):
                if wanted is None or row in wanted:
                    yield self._sample(piece, row, group)
                row += 1
                if last is not None and row > last:
                    return
        except (tarfile.TarError, OSError) as error:
            if wanted is None or row in wanted:
                yield broken_sample(piece, row, f"{piece.file}: after {row} samples", error)
            row += 1
        if others and (wanted is None or row in wanted):
            yield no_pictures(row, piece.file, others)

    def _groups(self, piece: Shard, others: Counter[str]) -> Iterator[Group]:
        """Yield the rows of a tar in order; `others` counts the members that are not part of a row."""
        path = f"{self.folder}/{piece.file}"
        with (
            self.filesystem.open_input_stream(path, compression=None, buffer_size=BUFFER) as stream,
            tarfile.open(fileobj=stream, mode="r|", bufsize=BUFFER, tarinfo=_Header) as tar,
        ):

            def content(member: tarfile.TarInfo) -> bytes:
                file = tar.extractfile(member)
                assert file, "only regular files are read"
                return file.read()

            grouping = Grouping(content, others, self.optional, self.further_columns)
            try:
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # otherwise it would keep every header
                    yield from grouping.add(member)
            except (tarfile.TarError, OSError):
                yield from grouping.whole()
                raise
            yield from grouping.end()

    def _sample(self, piece: Shard, row: int, group: Group) -> Sample:
        text, data, stratum, further, problem = "", b"", "", tuple[bytes, ...](), None
        name, data = group.parts.get("picture", next(iter(group.parts.values())))
        try:
            if group.problem:
                raise Rejected(*group.problem)
            fields = _object(*group.parts["json"]) if "json" in group.parts else {}
            if self.stratify:
                stratum = self._stratum(name, fields)
            text = self._caption_or_none(lambda: self._caption(group.parts, fields))
            if "picture" not in group.parts:
                raise Rejected("missing_file", f"no picture beside {name}")
            further = tuple(self._further_picture(column, group) for column in self.further_columns)
        except Rejected as rejected:
            data, problem = b"", rejected.with_traceback(None)
        name = legible(f"{piece.file}: {name}")
        return Sample(row, name, text, data, stratum, "instance", problem, further=further)

    @staticmethod
    def _further_picture(column: str, group: Group) -> bytes:
        if f".{column}" not in group.parts:
            raise incomplete(column, f"no picture x.{column}.png or the like beside x.png")
        return group.parts[f".{column}"][1]

    def _stratum(self, name: str, fields: dict[str, object]) -> str:
        assert self.stratify
        if self.stratify not in fields:
            raise Rejected("missing_stratum", f"no .json with {self.stratify!r} beside {name}")
        value = fields[self.stratify]
        return "" if value is None else legible(str(value))

    def _caption(self, parts: dict[str, tuple[str, bytes]], fields: dict[str, object]) -> str:
        named = self.caption_column
        if "txt" in parts and named in (None, "txt"):
            return decode_caption(parts["txt"][1])
        if named and named not in fields:
            raise Rejected("missing_caption", f"no .json with {named!r}, which caption_column names")
        text = fields.get(named or caption_column(fields))
        if text is not None and not isinstance(text, str):
            raise Rejected("missing_caption", f"the caption is {type(text).__name__}, not text")
        if text is not None and text != legible(text):
            raise Rejected("caption_not_utf8", "the text contains an unpaired surrogate")
        return check_caption(text)


def _object(name: str, content: bytes) -> dict[str, object]:
    try:
        fields = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Rejected("caption_not_utf8", f"{name} is not UTF-8") from None
    except ValueError as error:
        raise Rejected("missing_caption", f"{name} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Rejected("missing_caption", f"{name} is not a JSON object")
    return fields


def open_tars(listing: Listing, files: list[str], config: SourceConfig, stratify: str | None) -> WebDataset:
    """List the shards; their content is known only after reading.

    Raises:
        ConfigError: the configuration names a column for pictures, which a tar does not have.
    """
    if config.image_column:
        raise ConfigError(
            f"image_column: {config.image_column}: {listing.name} has tar files, which have no columns; "
            "remove it"
        )
    columns, further = (config.caption_column, stratify), tuple(config.further_columns)
    read = (*columns, further) if further else columns
    pieces: list[Piece] = [
        Shard(number, name, fingerprint("tar", listing.folder, name, listing.files[name], read), name)
        for number, name in enumerate(files)
    ]
    place = listing.filesystem, listing.folder
    return WebDataset(listing.name, None, pieces, *place, *columns, further_columns=further)
