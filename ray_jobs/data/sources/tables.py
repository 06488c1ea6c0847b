"""Tables with one picture per row, from Parquet and Arrow files: choice of columns, and rows as samples."""

from abc import abstractmethod
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs

from ray_jobs.config import ConfigError, SourceConfig
from ray_jobs.data.sources.samples import (
    Element,
    Piece,
    Sample,
    Source,
    broken_sample,
    check_caption,
    decode_caption,
    incomplete,
)
from ray_jobs.pictures.reading import Rejected

# Default columns if the configuration names none; the first existing one is used.
IMAGE_COLUMN = "image"
CAPTION_COLUMNS = ("text", "caption")  # "caption" is what img2dataset calls it
ONLY_PATH = (
    "the row has only the path of a picture, not its bytes; save the data set with save_to_disk, which "
    "writes them"
)


@dataclass(frozen=True)
class Columns:
    """Columns of a table to read; no caption if it is optional and there is none."""

    image: str
    caption: str | None
    stratify: str | None
    further: tuple[str, ...] = ()
    places: tuple[Element, ...] = ()  # of `further`

    @property
    def names(self) -> list[str]:
        named = (self.image, self.caption, self.stratify, *(each.column for each in self.places))
        return list(dict.fromkeys(name for name in named if name))

    @property
    def identity(self) -> tuple[object, ...]:
        """What a piece's digest depends on; as in releases without further pictures, where there are none."""
        found = (self.image, self.caption, self.stratify)
        return (*found, self.further) if self.further else found


@dataclass(frozen=True)
class Table(Source):
    """Files of rows, one picture per row."""

    filesystem: fs.FileSystem
    folder: str
    columns: Columns

    @abstractmethod
    def _batches(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a piece in order, with the columns to read."""

    @abstractmethod
    def _place(self, piece: Piece, row: int) -> str:
        """Location of a row of a piece, for display."""

    def _read(self, piece: Piece, wanted: Container[int] | None) -> Iterator[Sample]:
        rows = sorted(wanted) if isinstance(wanted, Collection) else None
        if rows is not None and not rows:
            return
        done = 0
        try:
            for batch in self._batches(piece):
                for number in range(batch.num_rows):
                    if wanted is None or done + number in wanted:
                        yield self._sample(self._place(piece, done + number), done + number, batch, number)
                done += batch.num_rows
                if rows is not None and done > rows[-1]:
                    return
        except (OSError, pa.ArrowException) as error:
            broken = done if rows is None else next((row for row in rows if row >= done), None)
            if broken is not None:
                yield broken_sample(piece, broken, self._place(piece, broken), error)

    def _sample(self, place: str, row: int, batch: pa.RecordBatch, number: int) -> Sample:
        """Build the sample in row `number` of a batch."""
        text, further, problem = "", tuple[bytes, ...](), None
        values = batch.slice(number, 1)
        data, path = _picture(values.column(self.columns.image))
        name = place + (f" ({path.decode(errors='replace')})" if path else "")
        stratify = self.columns.stratify
        stratum = _as_bytes(values.column(stratify)) if stratify else None
        try:
            column = self.columns.caption
            caption = _as_bytes(values.column(column)) if column else None
            text = self._caption_or_none(
                lambda: check_caption(None) if caption is None else decode_caption(caption)
            )
            if not data and path:
                raise Rejected("missing_file", ONLY_PATH)
            if not data:
                raise Rejected("empty_file", "the row has no picture")
            named = zip(self.columns.further, self.columns.places, strict=True)
            further = tuple(self._further_picture(name, each, values) for name, each in named)
        except Rejected as rejected:
            data, problem = b"", rejected.with_traceback(None)
        stratum_text = (stratum or b"").decode(errors="replace")
        return Sample(row, name, text, data, stratum_text, "instance", problem, further=further)

    @staticmethod
    def _further_picture(name: str, element: Element, values: pa.RecordBatch) -> bytes:
        column = values.column(element.column)
        if element.place is not None:
            column = column.flatten().slice(element.place, 1)
        data, path = _picture(column) if len(column) else (b"", None)
        if not data:
            raise incomplete(name, ONLY_PATH if path else "the row has none")
        return data


def _picture(column: pa.Array) -> tuple[bytes, bytes | None]:
    """First picture of a column, and its path if the column has paths; b"" if there is none."""
    if not pa.types.is_struct(column.type):
        return column[0].as_py() or b"", None
    fields = [field.name for field in column.type]
    path = _as_bytes(column.field("path")) if "path" in fields else None
    return column.field("bytes")[0].as_py() or b"", path


def _as_bytes(column: pa.Array) -> bytes | None:
    """First value of a column as UTF-8, or as its raw bytes; None for null."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not _is_bytes(column.type):
        column = column.cast(pa.string())
    return column.cast(pa.large_binary())[0].as_py()


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    is_string = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return is_string or _is_binary(kind)


def _is_picture(kind: pa.DataType) -> bool:
    """Return whether a column can hold pictures: bytes, or a struct with a bytes field."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    has_bytes = pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]
    return _is_binary(kind.field("bytes").type if has_bytes else kind)


def _elements(kind: pa.DataType) -> pa.DataType | None:
    """Return the type of the elements of a column of lists; None if it is none."""
    types = pa.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return kind.value_type if is_list else None


def caption_column(names: Collection[str]) -> str:
    """Default column or key of the caption, if the configuration names none."""
    return next((name for name in CAPTION_COLUMNS if name in names), CAPTION_COLUMNS[0])


def picture_columns(schema: pa.Schema) -> list[str]:
    """Columns of a table that can hold pictures."""
    return [field.name for field in schema if _is_picture(field.type)]


def find_columns(
    where: str, schema: pa.Schema, config: SourceConfig, stratify: str | None, optional: bool = False
) -> Columns:
    """Choose the columns to read.

    These are the configured ones; else `image` or the only one that can hold pictures, and `text` or
    `caption`.

    Args:
        optional: captions are optional.

    Raises:
        ConfigError: a column is missing, ambiguous or has another type; the message names the fix.
    """
    pictures, further = picture_columns(schema), tuple(config.further_columns)
    image = config.image_column
    if image is None and IMAGE_COLUMN not in schema.names:
        others = [name for name in pictures if name not in further]
        if len(others) > 1:
            raise ConfigError(
                f"{where}: has {len(others)} columns with bytes ({', '.join(others)}); name the "
                "one with the pictures in the source's image_column"
            )
        image = others[0] if others else None
    image = _require(where, schema, image or IMAGE_COLUMN, "the source's image_column")
    if image not in pictures:
        raise ConfigError(
            f"{where}: column {image!r} is {schema.field(image).type}, not binary or a struct with bytes; "
            "correct the source's image_column"
        )
    places = tuple(Element.of(name, schema.names) for name in further)
    for place in places:
        _require_pictures(where, schema, place)
    caption: str | None = config.caption_column or caption_column(schema.names)
    if optional and config.caption_column is None and caption not in schema.names:
        caption = None
    if caption:
        kind = schema.field(_require(where, schema, caption, "the source's caption_column")).type
        if not _is_bytes(kind.value_type if pa.types.is_dictionary(kind) else kind):
            raise ConfigError(
                f"{where}: column {caption!r} is {kind}, not string; correct the source's caption_column"
            )
    if stratify:
        kind = schema.field(_require(where, schema, stratify, "data.stratify or data.balance")).type
        try:
            pa.nulls(0, kind.value_type if pa.types.is_dictionary(kind) else kind).cast(pa.string())
        except pa.ArrowNotImplementedError:
            raise ConfigError(
                f"{where}: column {stratify!r} is {kind}, which has no simple values; correct "
                "data.stratify or data.balance"
            ) from None
    return Columns(image, caption, stratify, further, places)


def _require_pictures(where: str, schema: pa.Schema, element: Element) -> None:
    """Raise ConfigError if a column has no further pictures, or is a list where none is meant."""
    column, place = element
    fields = "reference_columns, control_column or mask_column"
    kind = schema.field(_require(where, schema, column, fields)).type
    inner = _elements(kind)
    if place is None and inner is not None:
        raise ConfigError(
            f"{where}: column {column!r} is a list; name its elements in the source's reference_columns: "
            f"{column}[0], {column}[1], ..."
        )
    if place is not None and inner is None:
        raise ConfigError(f"{where}: column {column!r} is {kind}, not a list; correct the source's {fields}")
    if not _is_picture(kind if inner is None else inner):
        raise ConfigError(
            f"{where}: column {column!r} is {kind}, not binary or a struct with bytes; correct the source's "
            f"{fields}"
        )


def _require(where: str, schema: pa.Schema, column: str, setting: str) -> str:
    if column not in schema.names:
        raise ConfigError(
            f"{where}: has no column {column!r} (found: {', '.join(schema.names)}); correct {setting}"
        )
    return column
