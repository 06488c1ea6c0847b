"""Pictures of a run with their captions: of its sources, or as a model wrote them; each can be corrected.

Without a captioning model a correction is saved in the source's `metadata.jsonl`, with one in the run's
`dataset/captions.jsonl`: prepare reads both. Neither needs Ray.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cluster.lease import Lease, Owner
from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, SourceConfig, resolve_path
from ray_jobs.data.curation.line_parts import REJECTED, read_lines
from ray_jobs.data.curation.scan import entries, read_index
from ray_jobs.data.encoding.captioning import EDITED, captions_file, own_caption, picture_name
from ray_jobs.data.preparation import INDEX, open_sources
from ray_jobs.data.sources.captions import OptionalCaptions
from ray_jobs.data.sources.detection import open_source
from ray_jobs.data.sources.dreambooth import Subject
from ray_jobs.data.sources.folders import Folder, Rows
from ray_jobs.data.sources.metadata import FILE_COLUMN
from ray_jobs.data.sources.samples import Piece, Source
from ray_jobs.data.sources.tables import caption_column
from ray_jobs.review.caption_files import CaptionFile, Changed
from ray_jobs.run.folder import RunFolder, SharedFolder

METADATA = "metadata.jsonl"
PIECES_AT_ONCE = 16  # pieces whose caption files are read in parallel


@dataclass(eq=False)
class Listed:
    """A picture with one of its captions.

    Attributes:
        source: number of its source.
        piece, row: its place there.
        name: name of the picture.
        text: the caption; "" if there is none.
        own: the source's own caption, where `text` may be another one.
        stratum: value of the column named by `data.stratify` or `data.balance`.
        written_by: model that wrote the caption; "" if none did.
        is_edited: whether it is a correction of that.
        file, line: file and number of its line there; None: none yet, -1: a line is yet to be added.
    """

    source: int
    piece: Piece
    row: int
    name: str
    text: str
    own: str = ""
    stratum: str = ""
    written_by: str = ""
    is_edited: bool = False
    file: CaptionFile | None = None
    line: int = 0


class Captions(ABC):
    """Captions of a run.

    Attributes:
        sources: the run's sources.
        items: their pictures, in order.
    """

    def __init__(self, config: Config, sources: list[Source], items: list[Listed]) -> None:
        self.config, self.sources, self.items = config, sources, items

    @abstractmethod
    def require_editable(self) -> None:
        """Raise ConfigError if corrections cannot be saved where they are read again."""

    @abstractmethod
    def save(self, item: Listed, text: str) -> None:
        """Save the caption of a picture.

        Raises:
            Changed: the file is no longer as it was read; nothing is saved.
            ConfigError: the run is in use.
        """

    def is_current(self) -> bool:
        """Return whether the files of captions are as they were read."""
        files = {id(item.file): item.file for item in self.items if item.file}
        return all(file.is_current for file in files.values())


def open_captions(config: Config) -> Captions:
    """List the pictures of a run with their captions.

    Raises:
        ConfigError: a source cannot be read; or a model writes captions, and has not written them yet.
    """
    if config.data.captioning.model:
        return WrittenCaptions.read(config)
    return SourceCaptions.read(config)


class SourceCaptions(Captions):
    """Captions in sources, for pictures that are files."""

    @classmethod
    def read(cls, config: Config) -> "SourceCaptions":
        sources, items = list[Source](), list[Listed]()
        for number, settings in enumerate(config.data.all_sources):
            source = _open(config, settings)
            if not isinstance(source, Folder):
                raise ConfigError(
                    f"{source.name}: its pictures and captions lie in tables or tar files, which are not "
                    "changed; use a folder of pictures, or let a model write captions (data.captioning)"
                )
            sources.append(source)
            items += _listed(source, number)
        found = cls(config, sources, items)
        for number, source in enumerate(sources):
            assert isinstance(source, Folder)
            if _is_in_lines(source):
                found._find_lines(number, source)
        return found

    def _find_lines(self, number: int, source: Folder) -> None:
        """Note in which line of the source's files each caption is."""
        folder = _storage(source)
        files = [CaptionFile(folder, name) for name in source.described_by]
        places = [(file, line) for file in files for line in range(len(file.rows))]
        own = [item for item in self.items if item.source == number]
        if len(own) != len(places):
            raise Changed(f"{source.name}: its list of captions was changed just now; run the command again")
        for item, (file, line) in zip(own, places, strict=True):
            item.file, item.line = file, line

    def require_editable(self) -> None:
        for source in self.sources:
            assert isinstance(source, Folder)
            if isinstance(source, Subject):
                raise ConfigError(
                    f"{source.name}: all its pictures have the caption {source.instance_prompt!r}, the "
                    "instance_prompt; remove that to give each its own"
                )
            if source.described_by and not _is_in_lines(source):
                file = source.described_by[0]
                raise ConfigError(
                    f"{source.name}: its captions are in {file}, which is not changed; export them with "
                    f"--export {METADATA}, use that file as the source's {METADATA} instead of {file}, and "
                    "edit it"
                )

    def save(self, item: Listed, text: str) -> None:
        settings = self.config.data.all_sources[item.source]
        if item.file is None:
            self._create(item.source)
            assert item.file
        file, fields = item.file, dict(item.file.rows[item.line])
        # As prepare chooses it: by the first line of the file.
        fields[settings.caption_column or caption_column(file.rows[0])] = text
        file.replace(item.line, fields)
        item.text, item.is_edited = text, True

    def _create(self, number: int) -> None:
        """Write a metadata.jsonl with all captions of a source that has none yet."""
        source, settings = self.sources[number], self.config.data.all_sources[number]
        assert isinstance(source, Folder)
        if _open(self.config, settings).digest != source.digest:
            raise Changed(f"{source.name} was changed meanwhile; reload the page, and edit the caption again")
        own = [item for item in self.items if item.source == number]
        column = settings.caption_column or caption_column(())
        file = CaptionFile(_storage(source), METADATA)
        file.create([{FILE_COLUMN: item.name, column: item.text} for item in own])
        for line, item in enumerate(own):
            item.file, item.line = file, line


def _open(config: Config, settings: SourceConfig) -> Source:
    """Open a source whose pictures need no captions, which stay as they are written."""
    rules, apart = OptionalCaptions(), SharedFolder.of(config).root
    return open_source(settings, config.data.column, rules, apart)


def _storage(source: Folder) -> Storage:
    return Storage(resolve_path(source.name), source.filesystem, source.folder)


def _is_in_lines(source: Folder) -> bool:
    """Whether the captions of a source are in JSON Lines of our own format."""
    names = source.described_by
    return bool(names) and all(name.rsplit("/", 1)[-1] == METADATA for name in names)


def _listed(source: Folder, number: int) -> Iterator[Listed]:
    """Yield the pictures that a source lists, but not those of a class, which share its prompt."""
    pieces = [piece for piece in source.pieces if isinstance(piece, Rows)]
    with ThreadPoolExecutor(PIECES_AT_ONCE) as pool:
        for piece, found in zip(pieces, pool.map(source.captions_of, pieces), strict=True):
            for at, (row, text) in enumerate(found):
                if row.role == "instance":
                    yield Listed(number, piece, at, row.file_name, text, stratum=row.stratum)


class WrittenCaptions(Captions):
    """Captions in the run's `captions.jsonl`, and pictures of which the model wrote nothing."""

    @classmethod
    def read(cls, config: Config) -> "WrittenCaptions":
        sources, dataset = open_sources(config), RunFolder.of(config).dataset
        found, index = entries(sources, config.data), dataset.child(INDEX)
        files = [_lines(dataset, captions_file(config, number)) for number in range(len(sources))]
        if not {entry.file for entry in found} <= set(index.files()) or not any(file.rows for file in files):
            raise ConfigError(
                f"{dataset.uri}: has no captions of these pictures yet; run python -m ray_jobs.prepare with "
                "this configuration first"
            )
        places = [_places(file) for file in files]
        rejected = read_lines(dataset, REJECTED)
        empty = {row["file_name"] for row in rejected if row["reason"] == "empty_caption"}
        items, columns = list[Listed](), ["row", "name", "text", "role", "reason", "lines", "stratum"]
        for entry, table in zip(found, read_index(index, [e.file for e in found], columns), strict=True):
            number, file = entry.source, files[entry.source]
            for row in table.to_pylist():
                name, own = picture_name(row["name"], row["lines"]), row["text"]
                item = Listed(
                    number, entry.piece, row["row"], name, own, own, row["stratum"], file=file, line=-1
                )
                if row["role"] != "instance" or row["reason"]:
                    continue
                # A row that repeats another one has no line of its own.
                line = places[number].pop((name, own), None)
                if line is not None:
                    fields = file.rows[line]
                    item.text, item.line = fields["text"], line
                    item.written_by = fields.get("written_by", "")
                    item.is_edited = bool(fields.get(EDITED))
                    items.append(item)
                elif not own and name in empty:
                    items.append(item)
        return cls(config, sources, items)

    def require_editable(self) -> None:
        """Every list of captions can be edited."""

    def save(self, item: Listed, text: str) -> None:
        assert item.file
        line = len(item.file.rows) if item.line < 0 else item.line
        fields: dict[str, Any] = {FILE_COLUMN: item.name, "text": text}
        fields |= {"written_by": item.written_by} if item.written_by else {}
        fields |= {"source_text": item.own} if item.own else {}
        lease = Lease(RunFolder.of(self.config).root, Owner.this())
        lease.take()  # a stage that has read the captions would write the list without this one
        try:
            item.file.replace(line, fields | {EDITED: True})
        finally:
            lease.release()
        item.text, item.line, item.is_edited = text, line, True


def _lines(dataset: Storage, name: str) -> CaptionFile:
    try:
        return CaptionFile(dataset, name)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{dataset.uri}/{name}: not JSON ({error}); correct or remove the file") from None


def _places(file: CaptionFile) -> dict[tuple[str, str], int]:
    """Numbers of the lines by name of the picture and the source's own caption."""
    try:
        return {(row[FILE_COLUMN], own_caption(row)): number for number, row in enumerate(file.rows)}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file.address}: a line is no object with file_name and text ({error}); correct or "
            "remove the file"
        ) from None
