"""Open a source: its kind is detected from the content of its files, not from one file's name.

Opening reads names and captions, or the schemas of tables, never a picture.
"""

import functools
import posixpath
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from cluster.storage import Storage
from ray_jobs.config import ConfigError, SourceConfig
from ray_jobs.config.data import FURTHER_COLUMNS
from ray_jobs.data.sources import annotations, arrow, dreambooth, folders, metadata, parquet, webdataset
from ray_jobs.data.sources.captions import AS_WRITTEN, CaptionRules, OptionalCaptions
from ray_jobs.data.sources.listing import Listing, list_files
from ray_jobs.data.sources.samples import Piece, Sample, Source

__all__ = ["Piece", "Sample", "Source", "list_files", "open_source"]

# Files that the datasets library writes with its tables.
COMPANIONS = (arrow.STATE_FILE, arrow.DICT_FILE, dreambooth.DREAMBOOTH_FILE)


@dataclass(frozen=True)
class _Kind:
    """A possible kind of source for a folder.

    Attributes:
        example: a file that indicates this kind.
        files: files of the listing that are read, if the source itself does not know them.
        rest: reason and detail for pictures that are not rows of the source.
    """

    example: str
    open: Callable[[], Source]
    files: Collection[str]
    rest: tuple[str, str]


def open_source(
    config: SourceConfig,
    stratify: str | None,
    captions: CaptionRules = AS_WRITTEN,
    apart: Storage | None = None,
) -> Source:
    """Detect the kind of source at `config.path`, and list its pieces.

    Args:
        config: source whose path (local, s3:// or gs://) is a folder or one .parquet, .arrow or .tar file, or
            an annotation tool's export beside its pictures.
        stratify: column whose value becomes a sample's `stratum`.
        captions: rules for reading captions.
        apart: folder to exclude if it is inside the source: the storage of runs.

    Raises:
        ConfigError: the path is empty or unreadable; the message names the path, the file and the fix.
    """
    try:
        export = annotations.named_file(config)
        path = export[0] if export and not config.annotations else config.path
        listing, notes = _chosen_splits(list_files(path, apart), config)
        optional = isinstance(captions, OptionalCaptions)
        if export:
            if config.instance_prompt or config.class_prompt:
                raise ConfigError(
                    f"{config.path}: has captions ({export[1]}) and also an instance_prompt or class_prompt "
                    "in data.sources; remove one of them"
                )
            name = "/".join(export).removeprefix("./")
            kind = _of_export(
                listing, name, lambda: annotations.read_named(export), config, stratify, optional
            )
        else:
            kind = _kind(listing, config, stratify, optional)
        source = kind.open()
        if source.further_columns != tuple(config.further_columns):  # subjects and annotation exports
            raise ConfigError(
                f"{config.path}: {FURTHER_COLUMNS}: the pictures of {kind.example} have no "
                "others; describe them in a metadata.jsonl with a column of file names for each, or remove it"
            )
        used = set(kind.files)
        if isinstance(source, folders.Folder):
            used |= source.listed(listing)
        rest = list(listing.left_out(used, *kind.rest, first=len(source.pieces)))
        return replace(source, pieces=[*source.pieces, *rest], notes=notes, captions=captions)
    except OSError as error:
        raise ConfigError(f"data.source: {config.path}: cannot be read: {error}") from None


def _kind(listing: Listing, config: SourceConfig, stratify: str | None, optional: bool) -> _Kind:
    """Detect the kind of source of a folder.

    Args:
        optional: captions are optional.

    Raises:
        ConfigError: the folder is not a source, or could be several kinds.
    """
    kinds = _with_captions(listing, config, stratify, optional)
    has_prompts = dreambooth.has_prompts(listing)
    if config.instance_prompt or has_prompts:
        if kinds:
            where = "data.sources" if config.instance_prompt else dreambooth.DREAMBOOTH_FILE
            raise ConfigError(
                f"{listing.name}: has captions ({kinds[0].example}) and also an instance_prompt in "
                f"{where}; remove one of them"
            )
        return _Kind(
            dreambooth.DREAMBOOTH_FILE,
            lambda: dreambooth.open_dreambooth(listing, config, stratify),
            [dreambooth.DREAMBOOTH_FILE],
            (
                "in_subfolder",
                f"a subject's pictures lie in the folder itself or in {dreambooth.CLASS_FOLDER}/",
            ),
        )
    if config.class_prompt:
        raise ConfigError(
            f"{listing.name}: has a class_prompt in data.sources but no instance_prompt; add one"
        )
    if kinds and _lies_here(kinds[0].files) and not any(_lies_here(other.files) for other in kinds[1:]):
        return kinds[0]
    if len(kinds) > 1:
        raise ConfigError(
            f"{listing.name}: could be two formats, because of {kinds[0].example} and {kinds[1].example}; "
            "remove one of them, or use a subfolder as the source"
        )
    if kinds:
        return kinds[0]
    if tables := listing.ending(".parquet"):  # without a picture column: the error lists the columns
        footers = parquet.read_footers(listing, tables)
        parquet.open_parquet(listing, footers, config, stratify, optional)
    if optional and (bare := listing.pictures()):
        return _Kind(
            bare[0],
            lambda: folders.open_caption_files(listing, {}, config, stratify),
            (),
            ("not_listed", ""),  # never used: every picture is a row
        )
    raise ConfigError(
        f"{listing.name}: no metadata.jsonl or metadata.csv, no dataset_info.json with prompts, no "
        "*.parquet, *.arrow or *.tar, no export of Label Studio or Labelbox, and no picture with a .txt of "
        "the same name; write a metadata.jsonl "
        'with one line per picture: {"file_name": "cat.png", "text": "a cat"}; or, if all pictures show the '
        "same subject, give the source an instance_prompt in data.sources; or let a model write captions: "
        "data.captioning.model"
    )


def _of_export(
    listing: Listing,
    name: str,
    read: Callable[[], bytes],
    config: SourceConfig,
    stratify: str | None,
    optional: bool,
) -> _Kind:
    """Return the kind of a folder whose pictures an annotation tool's export names.

    Args:
        read: function that reads the export.
    """
    return _Kind(
        name,
        lambda: annotations.open_annotations(listing, name, read, config, stratify, optional),
        [posixpath.basename(name)],
        ("not_listed", f"no entry of {name} names it"),
    )


def _lies_here(files: Collection[str]) -> bool:
    """Return whether a file is in the source's top folder; such files take precedence over deeper ones."""
    return any("/" not in name for name in files)


def _with_captions(
    listing: Listing, config: SourceConfig, stratify: str | None, optional: bool
) -> list[_Kind]:
    """Return the possible kinds of sources with their own captions for a folder."""
    kinds = []
    companions = [name for name in listing.files if posixpath.basename(name) in COMPANIONS]
    described = metadata.metadata_files(listing, config.image_column)
    if described:
        kinds.append(
            _Kind(
                described[0],
                lambda: metadata.open_image_folder(listing, described, config, stratify, optional),
                described,
                (
                    "not_listed",
                    f"no line of {described[0] if len(described) == 1 else 'a metadata file'} names it",
                ),
            )
        )
    footers = parquet.read_footers(
        listing, [name for name in listing.ending(".parquet") if name not in described]
    )
    tables = [footer.file for footer in footers if footer.has_pictures(config.image_column)]
    if tables:
        chosen = [footer for footer in footers if footer.file in set(tables)]
        kinds.append(
            _Kind(
                tables[0],
                lambda: parquet.open_parquet(listing, chosen, config, stratify, optional),
                [*tables, *companions],
                ("not_listed", "it lies beside Parquet files, which alone are read"),
            )
        )
    if arrows := arrow.arrow_files(listing):
        kinds.append(
            _Kind(
                arrows[0],
                lambda: arrow.open_arrow(listing, arrows, config, stratify, optional),
                [*arrows, *companions],
                ("not_listed", "it lies beside Arrow files, which alone are read"),
            )
        )
    if tars := listing.ending(".tar"):
        kinds.append(
            _Kind(
                tars[0],
                lambda: webdataset.open_tars(listing, tars, config, stratify),
                tars,
                ("not_listed", "it lies beside tar files, which alone are read"),
            )
        )
    kinds += [
        _of_export(listing, name, functools.partial(listing.read_bytes, name), config, stratify, optional)
        for name in annotations.export_files(listing)
    ]
    captions = folders.caption_files(listing)
    # A metadata file in a subfolder does not describe the pictures of the others.
    if captions and not _lies_here(described):
        kinds.append(
            _Kind(
                min(captions.values()),
                lambda: folders.open_caption_files(listing, captions, config, stratify),
                captions.values(),
                ("not_listed", ""),  # never used: every picture is a row
            )
        )
    return kinds


def _chosen_splits(listing: Listing, config: SourceConfig) -> tuple[Listing, tuple[str, ...]]:
    """Return the files of the configured splits, or all files, and a line that explains this.

    Raises:
        ConfigError: a configured split does not exist.
    """
    named = arrow.dict_splits(listing)
    if named:
        splits = {name: folder if (folder := name.split("/")[0]) in named else None for name in listing.files}
    else:
        splits = listing.splits()
    counts = Counter(split for split in splits.values() if split)
    for wanted in config.splits:
        if wanted not in counts:
            found = f"found: {', '.join(sorted(counts))}" if counts else "it has none"
            raise ConfigError(
                f"splits: {wanted}: {listing.name} has no such split ({found}); correct data.sources"
            )
    if config.splits:
        kept = {
            name: stamp for name, stamp in listing.files.items() if splits[name] in (*config.splits, None)
        }
        left = sum(count for split, count in counts.items() if split not in config.splits)
        names = ", ".join(config.splits)
        note = f"{listing.name}: reading only the splits {names}; {left:,} files of other splits are ignored"
        return replace(listing, files=kept), (note,)
    if len(counts) < 2:
        return listing, ()
    names = ", ".join(sorted(counts))
    return listing, (
        f"{listing.name}: its splits ({names}) are read as one set, which data.validation and data.test "
        "split again; to read only some of them, set the source's splits",
    )
