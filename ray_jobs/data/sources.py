"""Opening a source: what kind of place it is, is seen from what it holds.

Opening reads names and captions, or the footers of Parquet files, never a picture.
"""

import os
import posixpath
from collections.abc import Iterator

from pyarrow import fs

from cluster.storage import Storage
from ray_jobs.config import ConfigError, SourceConfig, resolve_path
from ray_jobs.data import dreambooth, folders, parquet, shards
from ray_jobs.data.samples import PICTURE_SUFFIXES, Listing, Piece, Sample, Source, Stamp, file_stamp

__all__ = ["Piece", "Sample", "Source", "list_files", "open_source"]


def open_source(config: SourceConfig, stratify: str | None) -> Source:
    """Find out what kind of source lies at `config.path`, and list its pieces.

    Args:
        config: a local path, s3:// or gs://, of a folder or of one .parquet or .tar file.
        stratify: the column whose value becomes a sample's `stratum`.

    Raises:
        ConfigError: there is nothing, or nothing that can be read; names the path, the file and the fix.
    """
    try:
        listing = list_files(config.path)
        files = listing.files
        metadata = [name for name in ("metadata.jsonl", "metadata.csv") if name in files]
        tables, tars = listing.ending(".parquet"), listing.ending(".tar")
        if len(metadata) > 1 or (tables and tars):
            both = metadata if len(metadata) > 1 else [tables[0], tars[0]]
            raise ConfigError(f"{config.path}: has {both[0]} and {both[1]}; remove one of them")
        if config.instance_prompt and (captions := [*metadata, *tables, *tars, *_caption_files(listing)]):
            raise ConfigError(
                f"{config.path}: has captions ({captions[0]}), and an instance_prompt in data.sources; "
                "remove one of them"
            )
        if config.instance_prompt or dreambooth.DREAMBOOTH_FILE in files:
            return dreambooth.open_dreambooth(listing, config, stratify)
        if config.class_prompt:
            raise ConfigError(
                f"{config.path}: has a class_prompt in data.sources, but no instance_prompt; give it one"
            )
        if metadata:
            return folders.open_image_folder(listing, metadata[0], stratify)
        if tables:
            return parquet.open_parquet(listing, tables, config, stratify)
        if tars:
            return shards.open_tars(listing, tars, config, stratify)
        if any(_caption_files(listing)):
            return folders.open_caption_files(listing, stratify)
    except OSError as error:
        raise ConfigError(f"data.source: {config.path}: cannot be read: {error}") from None
    raise ConfigError(
        f"{config.path}: has no metadata.jsonl or metadata.csv, no dataset_info.json, no *.parquet, "
        "no *.tar, and no picture with a .txt of the same name; write a metadata.jsonl with one line "
        'a picture: {"file_name": "cat.png", "text": "a cat"}; or give data.sources an instance_prompt, if '
        "all show the same thing"
    )


def _caption_files(listing: Listing) -> Iterator[str]:
    """The caption files that lie beside pictures."""
    names = (posixpath.splitext(name)[0] + ".txt" for name in listing.ending(*PICTURE_SUFFIXES))
    return (name for name in names if name in listing.files)


def list_files(path: str) -> Listing:
    """All files below a folder, or the one .parquet or .tar file that `path` names.

    Raises:
        ConfigError: there is no such folder or file.
        OSError: it cannot be read.
    """
    storage = Storage.open(resolve_path(path))
    filesystem, root = storage.filesystem, storage.path.rstrip("/")
    found = filesystem.get_file_info(root)
    if found.type == fs.FileType.File and root.lower().endswith((".parquet", ".tar")):
        folder, name = posixpath.split(root)
        return Listing(path, filesystem, folder, {name: (found.size, found.mtime_ns)})
    if found.type != fs.FileType.Directory:
        raise ConfigError(
            f"data.source: {path}: no such folder; name one with pictures and metadata.jsonl, "
            "or with .parquet or .tar files, or one such file"
        )
    if storage.is_local:
        return Listing(path, filesystem, root, _local_files(root))
    infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    files = {
        info.path[len(root) + 1 :]: (info.size, info.mtime_ns)
        for info in infos
        if info.type == fs.FileType.File
    }
    return Listing(path, filesystem, root, files)


def _local_files(root: str) -> dict[str, Stamp]:
    """Regular files, and links to such. Links to folders are not followed: they can lead in circles.

    FileSelector does follow them, up to the system's limit of 40, for every such link.
    """

    def fail(error: OSError) -> None:
        raise error

    files = {}
    for folder, _, names in os.walk(root, onerror=fail):
        for name in names:
            stamp = file_stamp(os.path.join(folder, name))
            if stamp:
                files[os.path.relpath(folder, root) + "/" + name if folder != root else name] = stamp
    return files
