"""Export pictures with their captions, to be corrected in another program and read again as a source."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, home, resolve_path
from ray_jobs.data.sources import label_studio, labelbox
from ray_jobs.data.sources.folders import Folder
from ray_jobs.data.sources.metadata import FILE_COLUMN
from ray_jobs.review.captions import Captions, Listed

Format = Literal["label-studio", "labelbox", "metadata.jsonl"]
FORMATS: tuple[Format, ...] = get_args(Format)


def export(config: Config, captions: Captions, format_: str, out: str, root: str | None = None) -> list[str]:
    """Write the captions of a run.

    Args:
        format_: one of FORMATS.
        out: file to write; it must not exist.
        root: LOCAL_FILES_DOCUMENT_ROOT of Label Studio; by default the folder above the pictures' folders.

    Returns:
        Lines that say what was written, and what to do with it.

    Raises:
        ConfigError: the format is unknown, the file exists, or the pictures are no files.
    """
    if format_ not in FORMATS:
        raise ConfigError(f"--export: {format_}: unknown; give {', '.join(FORMATS)}")
    if root is not None and format_ != "label-studio":
        raise ConfigError(f"--root: {root} changes nothing for {format_}; remove it")
    for source in captions.sources:
        if not isinstance(source, Folder):
            raise ConfigError(
                f"{source.name}: its pictures lie in tables or tar files, which other programs cannot show; "
                "use a folder of pictures"
            )
    if format_ == "label-studio":
        return _label_studio(config, captions, out, root)
    return (_labelbox if format_ == "labelbox" else _metadata)(config, captions, out)


def _label_studio(config: Config, captions: Captions, out: str, root: str | None) -> list[str]:
    folders = [_folder(captions, number) for number in range(len(captions.sources))]
    is_local = all("://" not in folder for folder in folders)
    if not is_local and root is not None:
        raise ConfigError(f"--root: {root} changes nothing for pictures in object storage; remove it")
    above = str((home() / Path(root)).resolve()) if root else os.path.commonpath([_above(f) for f in folders])
    tasks = []
    for items in _pictures(captions):
        address = _address(captions, items[0])
        if is_local:
            if os.path.commonpath([above, address]) != above:
                raise ConfigError(
                    f"--root: {root}: {address} is not below it; give a folder above the pictures"
                )
            address = label_studio.local_file(os.path.relpath(address, above))
        values = {config.data.column: items[0].stratum} if config.data.column else {}
        texts = [item.text for item in items if item.text]
        tasks.append(label_studio.task(address, texts, values, items[0].written_by))
    _write(out, json.dumps(tasks, ensure_ascii=False, indent=1) + "\n")
    steps = [
        f"wrote {len(tasks):,} tasks to {out}; labeling interface of the project: {label_studio.LABELING}"
    ]
    if is_local:
        steps += [
            "start Label Studio with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true "
            f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={above}",
            f"add as local storage of the project, which must not be the root: {', '.join(folders)}",
        ]
    return [
        *steps,
        "import the tasks; export the project as JSON; name that file as the source's annotations",
    ]


def _labelbox(config: Config, captions: Captions, out: str) -> list[str]:
    rows, labels, several = [], [], 0
    for items in _pictures(captions):
        key = f"{config.name}/{f'{items[0].source + 1}/' if len(captions.sources) > 1 else ''}{items[0].name}"
        rows.append(labelbox.data_row(_address(captions, items[0]), key))
        texts = [item.text for item in items if item.text]
        several += len(texts) > 1
        if texts:  # a classification has one answer
            labels.append(labelbox.label(key, "\n".join(texts)))
    stem, suffix = os.path.splitext(out)
    file = f"{stem}-labels{suffix}"
    _require_new(file)
    _write(out, _json_lines(rows))
    _write(file, _json_lines(labels))
    steps = [
        f"wrote {len(rows):,} data rows to {out} and {len(labels):,} labels to {file}",
        f"create the data rows; import the labels into a project with a free-form text named "
        f"{labelbox.CAPTION!r}; export it as NDJSON; name that file as the source's annotations",
    ]
    if several:
        steps.append(f"{several:,} pictures have several captions: lines of one text, see data.caption_lines")
    if config.data.column:
        steps.append(f"column {config.data.column!r} is not exported; add it as a radio there")
    return steps


def _metadata(config: Config, captions: Captions, out: str) -> list[str]:
    stem, suffix = os.path.splitext(out)
    is_one = len(captions.sources) == 1
    files = [out if is_one else f"{stem}-{number + 1}{suffix}" for number in range(len(captions.sources))]
    for file in files:
        _require_new(file)
    for number, file in enumerate(files):
        rows = [
            {FILE_COLUMN: item.name, "text": item.text}
            | ({config.data.column: item.stratum} if config.data.column else {})
            for item in captions.items
            if item.source == number
        ]
        _write(file, _json_lines(rows))
    return [f"wrote {len(captions.items):,} lines to {', '.join(files)}"]


def _pictures(captions: Captions) -> Iterable[Sequence[Listed]]:
    """Items by picture: one with several captions is several items."""
    found: dict[tuple[int, str], list[Listed]] = {}
    for item in captions.items:
        found.setdefault((item.source, item.name), []).append(item)
    return found.values()


def _folder(captions: Captions, number: int) -> str:
    """Absolute path of a source's folder, or its address in an object store."""
    source = captions.sources[number]
    assert isinstance(source, Folder)
    place = resolve_path(source.name)
    scheme = f"{place.partition('://')[0]}://" if "://" in place else ""
    return f"{scheme}{source.folder}"


def _above(folder: str) -> str:
    return os.path.dirname(folder.rstrip("/"))


def _address(captions: Captions, item: Listed) -> str:
    return f"{_folder(captions, item.source)}/{item.name}"


def _json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _require_new(file: str) -> None:
    if (home() / Path(file).expanduser()).exists():
        raise ConfigError(f"--export: {file} exists, perhaps with corrections; give another name")


def _write(file: str, text: str) -> None:
    _require_new(file)
    path = home() / Path(file).expanduser()
    Storage.open(str(path.parent)).write_text(path.name, text)
