"""Exports as a source: pictures in a folder, with captions from Label Studio's JSON or Labelbox's NDJSON."""

import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from cluster.storage import Storage
from ray_jobs.config import ConfigError, SourceConfig, resolve_path
from ray_jobs.data.sources import arrow, dreambooth
from ray_jobs.data.sources.exports import Labelled, PictureNames, picture_path, read_entries
from ray_jobs.data.sources.folders import Folder, Row, folder_of_rows
from ray_jobs.data.sources.label_studio import is_task, read_tasks
from ray_jobs.data.sources.labelbox import is_data_row, read_data_rows
from ray_jobs.data.sources.listing import PICTURE_SUFFIXES, Listing, is_hidden
from ray_jobs.data.sources.metadata import METADATA_FILES
from ray_jobs.data.sources.samples import legible
from ray_jobs.data.sources.tables import CAPTION_COLUMNS

SUFFIXES = (".json", ".jsonl", ".ndjson")
OTHERS = (arrow.STATE_FILE, arrow.DICT_FILE, dreambooth.DREAMBOOTH_FILE, *METADATA_FILES)
LOOKED_AT = 16  # files of a folder that may be exports; one with more has JSON for other purposes
HEAD = 1 << 16  # bytes of a file that are looked at
LABEL_STUDIO = re.compile(rb'(?=.*"data"\s*:)(?=.*"(annotations|predictions|completions)"\s*:)', re.DOTALL)
LABELBOX = re.compile(rb'"data_row"\s*:|"DataRow ID"\s*:|"Labeled Data"\s*:')


def named_file(config: SourceConfig) -> tuple[str, str] | None:
    """Return the folder and the file of the export that a source names, or None: `annotations`, or `path`."""
    if config.annotations:
        return split_path(config.annotations)
    folder, name = split_path(config.path)
    return (folder, name) if name.lower().endswith(SUFFIXES) else None


def split_path(path: str) -> tuple[str, str]:
    """Split the name of a file, local or a URL with a query, from its folder."""
    address, mark, query = path.partition("?") if "://" in path else (path, "", "")
    folder, name = posixpath.split(address)
    return (folder or ".") + mark + query, name


def export_files(listing: Listing) -> list[str]:
    """Return the files directly in a folder that look like exports, read only by their beginnings."""
    stems = {posixpath.splitext(name)[0] for name in listing.ending(*PICTURE_SUFFIXES)}
    names = [
        name
        for name in listing.ending(*SUFFIXES)
        if "/" not in name and name not in OTHERS and posixpath.splitext(name)[0] not in stems
    ]
    if len(names) > LOOKED_AT:
        return []
    return [name for name in names if not is_hidden(name) and _looks_like_export(listing, name)]


def _looks_like_export(listing: Listing, name: str) -> bool:
    with listing.filesystem.open_input_file(f"{listing.folder}/{name}") as file:
        head = bytes(file.read(HEAD)).removeprefix(b"\xef\xbb\xbf").lstrip()
    starts = head.startswith((b"[", b"{"))
    return starts and bool(LABELBOX.search(head) or (head.startswith(b"[") and LABEL_STUDIO.match(head)))


def read_named(file: tuple[str, str]) -> bytes:
    """Read the export in a folder, wherever that is; raise ConfigError if there is none."""
    folder, name = file
    storage = Storage.open(resolve_path(folder))
    if not storage.exists(name):
        raise ConfigError(f"data.sources: {folder}/{name}: no such file; correct annotations or path")
    return storage.read_bytes(name)


def open_annotations(
    listing: Listing,
    name: str,
    read: Callable[[], bytes],
    config: SourceConfig,
    stratify: str | None,
    optional: bool = False,
) -> Folder:
    """Open the pictures of a folder that an export names.

    Args:
        name: name of the export, which need not be in the folder of the pictures.
        read: function that reads it.
        optional: captions are optional.

    Raises:
        ConfigError: the export has another format, or no captions; none of its pictures is in the folder; or
            two of its pictures would be the same file.
    """
    pictures = _read(name, read(), config)
    caption = _caption_name(name, pictures, config, optional)
    _require_column(name, pictures, stratify)
    source = folder_of_rows(listing, _rows(name, listing, pictures, caption, stratify), f"{name}: rows")
    return replace(source, described_by=(name,))


def _read(where: str, content: bytes, config: SourceConfig) -> list[Labelled]:
    entries = read_entries(where, content)
    if is_data_row(entries[0]):
        if config.image_column:
            raise ConfigError(
                f"image_column: {config.image_column}: Labelbox has no column of pictures; remove it"
            )
        return read_data_rows(where, entries)
    if is_task(entries[0]):
        return read_tasks(where, entries, config.image_column)
    found = ", ".join(entries[0]) or "nothing"
    raise ConfigError(
        f"{where}: neither a JSON export of Label Studio, whose tasks have data (JSON-MIN has not), nor an "
        f"NDJSON export of Labelbox, whose lines have data_row (found: {found}); export it again"
    )


def _caption_name(
    where: str, pictures: Sequence[Labelled], config: SourceConfig, optional: bool
) -> str | None:
    """Name under which the captions were written; None if there are none, and they are optional."""
    names = sorted({name for picture in pictures for name, texts in picture.captions.items() if texts})
    kinds = sorted({kind for picture in pictures for kind in picture.kinds})
    if not names and not (optional and config.caption_column is None):
        raise ConfigError(
            f"{where}: has no captions, only {', '.join(kinds) or 'pictures'}; captions are texts of a "
            "TextArea in Label Studio, and of a free-form text classification in Labelbox"
        )
    if config.caption_column:
        if config.caption_column not in names:
            raise ConfigError(
                f"{where}: has no captions named {config.caption_column!r} (found: {', '.join(names)}); "
                "correct the source's caption_column"
            )
        return config.caption_column
    usual = [name for name in CAPTION_COLUMNS if name in names]
    if len(names) > 1 and not usual:
        raise ConfigError(
            f"{where}: has texts named {', '.join(names)}; name the captions in the source's caption_column"
        )
    return next(iter(usual or names), None)


def _require_column(where: str, pictures: Sequence[Labelled], stratify: str | None) -> None:
    names = sorted({name for picture in pictures for name in picture.values})
    if stratify and stratify not in names:
        raise ConfigError(
            f"{where}: field {stratify!r} is missing (found: {', '.join(names) or 'nothing'}); correct "
            "data.stratify or data.balance"
        )


def _rows(
    where: str, listing: Listing, pictures: Sequence[Labelled], caption: str | None, stratify: str | None
) -> Iterator[Row]:
    """Yield the rows of the pictures, one per caption; a picture without captions has one row."""
    names = PictureNames(listing.files)
    files = [names.find(picture.references) for picture in pictures]
    if not any(files):
        raise ConfigError(
            f"{where}: none of its {len(files):,} pictures is in {listing.name}, e.g. "
            f"{pictures[0].references[-1]}; put them there (URLs are not downloaded), or give their folder "
            "as path and this file as annotations in data.sources"
        )
    firsts: dict[str, Labelled] = {}
    for picture, file in zip(pictures, files, strict=True):
        if file and firsts.setdefault(file, picture).references != picture.references:
            raise ConfigError(
                f"{picture.place}: {picture.references[-1]} would be {listing.name}/{file}, as is "
                f"{firsts[file].references[-1]}; keep the pictures in the folders that the export names"
            )
        name = file or picture_path(picture.references[-1]).lstrip("/")
        texts = [text for text in picture.captions.get(caption or "", []) if text.strip()]
        stratum = picture.values.get(stratify, "") if stratify else ""
        for text in texts or (None,):
            yield Row(
                legible(name),
                text=None if text is None else legible(text),
                stratum=legible(stratum),
                is_utf8=name + (text or "") == legible(name + (text or "")),
            )
