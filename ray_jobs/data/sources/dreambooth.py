"""DreamBooth (Ruiz et al., arXiv 2208.12242): pictures of a subject, and of its class, with a prompt each."""

import json
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray_jobs.config import ConfigError, SourceConfig
from ray_jobs.data.sources.folders import Folder, file_row, folder_of_rows, refuse_columns
from ray_jobs.data.sources.listing import Listing

DREAMBOOTH_KEYS = ("instance_prompt", "class_prompt")
DREAMBOOTH_FILE = "dataset_info.json"
CLASS_FOLDER = "class_data_dir"
# Keys of the file of the same name that the datasets library (5.2) writes beside its own tables.
LIBRARY_KEYS = {"features", "builder_name", "splits", "citation", "homepage", "license"}


@dataclass(frozen=True)
class Subject(Folder):
    """Pictures of one thing, for DreamBooth.

    Attributes:
        instance_prompt: the caption of them all.
        class_prompt: what kind of thing it is; None if that is not told.
        num_class_pictures: of its kind, that lie in the folder.
    """

    instance_prompt: str
    class_prompt: str | None
    num_class_pictures: int


def open_dreambooth(listing: Listing, config: SourceConfig, stratify: str | None) -> Subject:
    """A few pictures of one thing, and pictures of its class, if any; prompts from the configuration or from
    dataset_info.json.

    Raises:
        ConfigError: a prompt is missing or given twice, dataset_info.json has an unknown key, or there are no
            pictures.
    """
    refuse_columns(listing, config, stratify)
    prompts = _prompts(listing, config)
    rows, folders = [], {"": ("instance", "instance_prompt"), CLASS_FOLDER: ("class", "class_prompt")}
    for name in listing.pictures():
        role, key = folders.get(posixpath.dirname(name), ("", ""))
        if not role:
            continue
        if key not in prompts:
            where = f"{listing.name}/{DREAMBOOTH_FILE}" if has_prompts(listing) else listing.name
            raise ConfigError(f"{where}: {key!r} is missing; {CLASS_FOLDER}/ has pictures that need it")
        rows.append(file_row(name, text=prompts[key], role=role))
    num_class = sum(row.role == "class" for row in rows)
    if num_class == len(rows):
        raise ConfigError(f"{listing.name}: has no picture of the subject, outside of subfolders; add some")
    return Subject(
        **vars(folder_of_rows(listing, rows, "pictures")),
        instance_prompt=prompts["instance_prompt"],
        class_prompt=prompts.get("class_prompt"),
        num_class_pictures=num_class,
    )


def class_pictures(listing: Listing, names: Iterable[str], class_prompt: str) -> Folder:
    """The named files of a folder as pictures of a class."""
    return folder_of_rows(
        listing, (file_row(name, text=class_prompt, role="class") for name in names), "pictures"
    )


def has_prompts(listing: Listing) -> bool:
    """Whether there is a dataset_info.json with prompts, not the datasets library's own file of that name.

    Raises:
        ConfigError: it is neither.
    """
    if DREAMBOOTH_FILE not in listing.files:
        return False
    content = _content(listing)
    return not (isinstance(content, dict) and content.keys() & LIBRARY_KEYS - set(DREAMBOOTH_KEYS))


def _content(listing: Listing) -> Any:
    try:
        return json.loads(listing.read_bytes(DREAMBOOTH_FILE))
    except ValueError as error:
        raise ConfigError(f"{listing.name}/{DREAMBOOTH_FILE}: not JSON ({error})") from None


def _prompts(listing: Listing, config: SourceConfig) -> dict[str, str]:
    """The prompts of a subject by their key, from the configuration and from dataset_info.json."""
    told = {key: prompt for key in DREAMBOOTH_KEYS if (prompt := getattr(config, key))}
    if not has_prompts(listing):
        return told
    where = f"{listing.name}/{DREAMBOOTH_FILE}"
    written = _written_prompts(where, _content(listing))
    for key in told.keys() & written.keys():
        raise ConfigError(f"{where}: {key!r} is given here and in data.sources; remove one")
    if "instance_prompt" not in told | written:
        raise ConfigError(f"{where}: 'instance_prompt' is missing; write what the pictures show")
    return told | written


def _written_prompts(where: str, prompts: Any) -> dict[str, str]:
    """The content of dataset_info.json, checked."""
    if not isinstance(prompts, dict):
        raise ConfigError(f'{where}: not an object; write {{"instance_prompt": "a photo of sks dog"}}')
    for key, value in prompts.items():
        if key not in DREAMBOOTH_KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}; it takes {' and '.join(DREAMBOOTH_KEYS)}")
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{where}: {key!r} must be a text that is not empty, not {value!r}")
    return {key: value.strip() for key, value in prompts.items()}
