"""DreamBooth source (Ruiz et al., arXiv 2208.12242): pictures of a subject and its class, with prompts."""

import json
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass

from ray_jobs.config import ConfigError, SourceConfig
from ray_jobs.data.sources.folders import Folder, Row, file_row, folder_of_rows, refuse_columns
from ray_jobs.data.sources.listing import Listing
from ray_jobs.data.sources.samples import Role

DREAMBOOTH_KEYS = ("instance_prompt", "class_prompt")
DREAMBOOTH_FILE = "dataset_info.json"
CLASS_FOLDER = "class_data_dir"
# Keys of the file with the same name that the datasets library (5.2) writes with its own tables.
LIBRARY_KEYS = {"features", "builder_name", "splits", "citation", "homepage", "license"}


@dataclass(frozen=True)
class Subject(Folder):
    """Pictures of one subject, for DreamBooth.

    Attributes:
        instance_prompt: caption of all its pictures.
        class_prompt: prompt of its class; None if not given.
        num_photos: number of pictures of the subject.
        num_class_pictures: number of class pictures in the folder.
    """

    instance_prompt: str
    class_prompt: str | None
    num_photos: int
    num_class_pictures: int


def open_dreambooth(listing: Listing, config: SourceConfig, stratify: str | None) -> Subject:
    """Open a few pictures of one subject, and pictures of its class, if any.

    The prompts come from the configuration or from dataset_info.json.

    Raises:
        ConfigError: a prompt is missing or given twice, dataset_info.json has an unknown key, or there are no
            pictures.
    """
    refuse_columns(listing, config, stratify)
    prompts = _prompts(listing, config)
    rows: list[Row] = []
    folders: dict[str, tuple[Role, str]] = {
        "": ("instance", "instance_prompt"),
        CLASS_FOLDER: ("class", "class_prompt"),
    }
    for name in listing.pictures():
        folder = posixpath.dirname(name)
        if folder not in folders:
            continue
        role, key = folders[folder]
        if key not in prompts:
            where = f"{listing.name}/{DREAMBOOTH_FILE}" if has_prompts(listing) else listing.name
            raise ConfigError(f"{where}: {key!r} is missing; the pictures in {CLASS_FOLDER}/ need it")
        rows.append(file_row(name, text=prompts[key], role=role))
    num_class = sum(row.role == "class" for row in rows)
    if num_class == len(rows):
        raise ConfigError(f"{listing.name}: has no picture of the subject; put some directly into the folder")
    return Subject(
        **vars(folder_of_rows(listing, rows, "pictures")),
        instance_prompt=prompts["instance_prompt"],
        class_prompt=prompts.get("class_prompt"),
        num_photos=len(rows) - num_class,
        num_class_pictures=num_class,
    )


def class_pictures(listing: Listing, names: Iterable[str], class_prompt: str) -> Folder:
    """Source of the named files of a folder as class pictures."""
    return folder_of_rows(
        listing, (file_row(name, text=class_prompt, role="class") for name in names), "pictures"
    )


def has_prompts(listing: Listing) -> bool:
    """Return whether there is a dataset_info.json with prompts, not the datasets library's file of that name.

    Raises:
        ConfigError: the file is neither.
    """
    if DREAMBOOTH_FILE not in listing.files:
        return False
    content = _content(listing)
    return not (isinstance(content, dict) and content.keys() & LIBRARY_KEYS - set(DREAMBOOTH_KEYS))


def _content(listing: Listing) -> object:
    try:
        return json.loads(listing.read_bytes(DREAMBOOTH_FILE))
    except ValueError as error:
        raise ConfigError(f"{listing.name}/{DREAMBOOTH_FILE}: not JSON ({error})") from None


def _prompts(listing: Listing, config: SourceConfig) -> dict[str, str]:
    """Prompts of a subject by key, from the configuration and from dataset_info.json."""
    told = {key: prompt for key in DREAMBOOTH_KEYS if (prompt := getattr(config, key))}
    if not has_prompts(listing):
        return told
    where = f"{listing.name}/{DREAMBOOTH_FILE}"
    written = _written_prompts(where, _content(listing))
    for key in told.keys() & written.keys():
        raise ConfigError(f"{where}: {key!r} is set here and in data.sources; remove one")
    if "instance_prompt" not in told | written:
        raise ConfigError(
            f"{where}: 'instance_prompt' is missing; describe the subject, for example a photo of sks dog"
        )
    return told | written


def _written_prompts(where: str, prompts: object) -> dict[str, str]:
    """Validate the content of dataset_info.json, and return its prompts."""
    if not isinstance(prompts, dict):
        raise ConfigError(f'{where}: not an object; write {{"instance_prompt": "a photo of sks dog"}}')
    for key, value in prompts.items():
        if key not in DREAMBOOTH_KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}; it takes {' and '.join(DREAMBOOTH_KEYS)}")
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{where}: {key!r} must be a text and not empty, but is {value!r}")
    return {key: value.strip() for key, value in prompts.items()}
