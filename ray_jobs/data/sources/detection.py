"""Opening a source: what kind of place it is, is seen from what its files hold, not from one file's name.

Opening reads names and captions, or the schemas of tables, never a picture.
"""

import posixpath
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from cluster.storage import Storage
from ray_jobs.config import ConfigError, SourceConfig
from ray_jobs.data.sources import arrow, dreambooth, folders, metadata, parquet, webdataset
from ray_jobs.data.sources.captions import AS_WRITTEN, CaptionRules
from ray_jobs.data.sources.listing import Listing, list_files
from ray_jobs.data.sources.samples import Piece, Sample, Source

__all__ = ["Piece", "Sample", "Source", "list_files", "open_source"]

# What the datasets library writes beside its tables.
COMPANIONS = (arrow.STATE_FILE, arrow.DICT_FILE, dreambooth.DREAMBOOTH_FILE)


@dataclass(frozen=True)
class _Kind:
    """A kind of source that a folder could be.

    Attributes:
        example: a file that speaks for it.
        files: of the listing that are read, where it is not the source that knows.
        rest: why a picture is no row of it: reason and detail.
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
    """Find out what kind of source lies at `config.path`, and list its pieces.

    Args:
        config: a local path, s3:// or gs://, of a folder or of one .parquet, .arrow or .tar file.
        stratify: the column whose value becomes a sample's `stratum`.
        captions: how captions are read.
        apart: a folder that is no part of the source although it may lie in it: the storage of runs.

    Raises:
        ConfigError: there is nothing, or nothing that can be read; names the path, the file and the fix.
    """
    try:
        listing, notes = _chosen_splits(list_files(config.path, apart), config)
        kind = _kind(listing, config, stratify)
        source = kind.open()
        used = set(kind.files)
        if isinstance(source, folders.Folder):
            used |= source.listed()
        rest = list(listing.left_out(used, *kind.rest, first=len(source.pieces)))
        return replace(source, pieces=[*source.pieces, *rest], notes=notes, captions=captions)
    except OSError as error:
        raise ConfigError(f"data.source: {config.path}: cannot be read: {error}") from None


def _kind(listing: Listing, config: SourceConfig, stratify: str | None) -> _Kind:
    """The kind of source that a folder is.

    Raises:
        ConfigError: it is none, or could be several.
    """
    kinds = _with_captions(listing, config, stratify)
    has_prompts = dreambooth.has_prompts(listing)
    if config.instance_prompt or has_prompts:
        if kinds:
            where = "data.sources" if config.instance_prompt else dreambooth.DREAMBOOTH_FILE
            raise ConfigError(
                f"{listing.name}: has captions ({kinds[0].example}), and an instance_prompt in {where}; "
                "remove one of them"
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
            f"{listing.name}: has a class_prompt in data.sources, but no instance_prompt; give it one"
        )
    if kinds and _lies_here(kinds[0].files) and not any(_lies_here(other.files) for other in kinds[1:]):
        return kinds[0]
    if len(kinds) > 1:
        raise ConfigError(
            f"{listing.name}: has {kinds[0].example} and {kinds[1].example}; remove one of them, or name a "
            "subfolder as the source"
        )
    if kinds:
        return kinds[0]
    if tables := listing.ending(".parquet"):  # without a column that holds pictures: says which there are
        footers = parquet.read_footers(listing, tables)
        parquet.open_parquet(listing, footers, config, stratify)
    raise ConfigError(
        f"{listing.name}: has no metadata.jsonl or metadata.csv, no dataset_info.json with prompts, no "
        "*.parquet or *.arrow, no *.tar, and no picture with a .txt of the same name; write a metadata.jsonl "
        'with one line a picture: {"file_name": "cat.png", "text": "a cat"}; or give data.sources an '
        "instance_prompt, if all show the same thing"
    )


def _lies_here(files: Collection[str]) -> bool:
    """Whether some files lie in a source's folder itself: they come before what only lies deeper."""
    return any("/" not in name for name in files)


def _with_captions(listing: Listing, config: SourceConfig, stratify: str | None) -> list[_Kind]:
    """The kinds of sources with captions of their own that a folder could be."""
    kinds = []
    companions = [name for name in listing.files if posixpath.basename(name) in COMPANIONS]
    described = metadata.metadata_files(listing, config.image_column)
    if described:
        kinds.append(
            _Kind(
                described[0],
                lambda: metadata.open_image_folder(listing, described, config, stratify),
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
                lambda: parquet.open_parquet(listing, chosen, config, stratify),
                [*tables, *companions],
                ("not_listed", "it lies beside Parquet files, which alone are read"),
            )
        )
    if arrows := arrow.arrow_files(listing):
        kinds.append(
            _Kind(
                arrows[0],
                lambda: arrow.open_arrow(listing, arrows, config, stratify),
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
    captions = folders.caption_files(listing)
    # A metadata file of a subfolder does not speak for the pictures of the others.
    if captions and not _lies_here(described):
        kinds.append(
            _Kind(
                min(captions.values()),
                lambda: folders.open_caption_files(listing, captions, config, stratify),
                captions.values(),
                ("not_listed", ""),  # there is none: every picture is a row
            )
        )
    return kinds


def _chosen_splits(listing: Listing, config: SourceConfig) -> tuple[Listing, tuple[str, ...]]:
    """The files of the splits that the configuration names, or all; and a line on what that means.

    Raises:
        ConfigError: there is no split of such a name.
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
        note = f"{listing.name}: of its splits, {names} is read; {left:,} files of others are not"
        return replace(listing, files=kept), (note,)
    if len(counts) < 2:
        return listing, ()
    names = ", ".join(sorted(counts))
    return listing, (
        f"{listing.name}: its splits ({names}) are read as one set, which data.validation and data.test "
        "split anew; name some of them in the source's splits to read no others",
    )
