"""What takes space below a storage: runs with their checkpoints, shared caches, registered weights."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import yaml

from cluster.lease import LEASES, holder
from cluster.sqlite import sqlite_file
from cluster.storage import Storage, canonical
from ray_jobs.config import NO_RUNS, Config, ConfigError
from ray_jobs.data.encoding.cache_files import ASIDE
from ray_jobs.data.encoding.encoding import EMPTY_CAPTION
from ray_jobs.data.feeding.dataset import PARTS
from ray_jobs.registry.models import shown_uri, sources
from ray_jobs.run.folder import (
    BEGINS_FROM,
    CONFIG,
    DATASET,
    DATASETS,
    ENCODED,
    REGISTRY,
    SEARCH,
    TRAININGS,
    RunFolder,
    SharedFolder,
)
from ray_jobs.run.manifest import MANIFEST, Manifest
from ray_jobs.run.records import WINNER, RungRow, Winner, read_rows
from ray_jobs.training.checkpoint import FOLDER, place_of
from ray_jobs.tuning.results import FINISHED, TUNE, result_digest

Sizes = Mapping[str, int]
Versions = Mapping[tuple[str, int], Sequence[str]]
"""Folders of registered weights, and of the bases that they go with, by model and version."""

Place = tuple[str, str]
"""A training and the folder of one of its checkpoints."""


@dataclass(frozen=True)
class RunSpace:
    """A run with the bytes of its files, by path below its folder.

    Attributes:
        kept_whole: why nothing of it may be deleted; empty: it is published.
        winner: checkpoint of its winner; None unless it is published.
        ranking: its measured checkpoints, best first; those of a candidate, which has one for each fold,
            stand together.
        needed: its checkpoints that versions, or configurations of runs, refer to.
    """

    name: str
    root: Storage
    sizes: Sizes
    kept_whole: str
    winner: Place | None
    ranking: list[list[Place]]
    needed: set[Place]

    def part(self, folder: str) -> int:
        """Return the bytes of the files below a folder of the run."""
        return sum(size for name, size in self.sizes.items() if name.startswith(f"{folder}/"))

    def of_checkpoints(self, kind: str) -> dict[Place, int]:
        """Return the bytes of a part of each checkpoint that has it: `STATE` or `WEIGHTS`."""
        found: dict[Place, int] = {}
        for name, size in self.sizes.items():
            match name.split("/"):
                case [top, training, step, part, _, *_] if (top, part) == (TRAININGS, kind):
                    if step.startswith(FOLDER):
                        found[training, step] = found.get((training, step), 0) + size
        return found


@dataclass(frozen=True)
class Inventory:
    """All that takes space below a storage.

    Attributes:
        shared: bytes of the other folders and files, by name.
        unused: paths of encoded files that no run uses, with their bytes.
        unused_unknown: why that cannot be said; then `unused` is empty.
        unregistered: folders of weights of no version, below `registry/`.
    """

    root: Storage
    runs: list[RunSpace]
    shared: Sizes
    unused: Sizes
    unused_unknown: str
    unregistered: Sizes


def take_inventory(config: Config, refused: Collection[str] = ()) -> Inventory:
    """Look through the storage of a configuration.

    Args:
        refused: names of runs whose lease was not to be had, which are in use.

    Raises:
        ConfigError: the registry cannot be reached.
    """
    root, versions = SharedFolder.of(config).root, sources(config)
    names = run_names(root)
    sizes: dict[str, dict[str, int]] = {}
    for path, size in root.sizes().items():
        top, _, below = path.partition("/")
        sizes.setdefault(top, {})[below] = size
    texts = [text for name in names for text in _texts(root.child(name))]
    texts += _strings(config.model_dump(mode="json"))
    referred = {_place(text) for text in chain(*versions.values(), texts)}
    found = [_run(config, name, root.child(name), sizes.get(name, {}), versions, referred) for name in names]
    runs = [
        replace(each, kept_whole="in use by another driver")
        if each.name in refused and not each.kept_whole.startswith("in use")
        else each
        for each in found
    ]
    shared = {name: sum(below.values()) for name, below in sizes.items() if name not in names}
    unknown, unused = _unused(sizes.get(ENCODED, {}), runs)
    registered: dict[str, int] = {}
    for path, size in sizes.get(REGISTRY, {}).items():
        folder = "/".join(path.split("/")[:2])
        registered[folder] = registered.get(folder, 0) + size
    orphans = {
        f"{REGISTRY}/{name}": size
        for name, size in registered.items()
        if canonical(root.child(REGISTRY, name).uri) not in referred
    }
    return Inventory(root, runs, shared, unused, unknown, orphans)


def needed_by(config: Config, others: Iterable[Config] = ()) -> str:
    """Return what refers to a file of a run, as its adapter or base for example; empty if nothing does.

    Args:
        config: the run's.
        others: configurations of runs that lie elsewhere.

    Raises:
        ConfigError: the registry cannot be reached, or a run's configuration is damaged.
    """
    root = SharedFolder.of(config).root
    below = canonical(RunFolder.of(config).root.uri)
    texts = {f"run {name}": _texts(root.child(name)) for name in run_names(root) if name != config.name}
    texts |= {f"run {each.name}": _strings(each.model_dump(mode="json")) for each in others}
    texts |= {f"{name} version {version}": uris for (name, version), uris in sources(config).items()}
    for name, found in texts.items():
        if any(f"{_place(text)}/".startswith(f"{below}/") for text in found):
            return name
    return ""


def run_names(root: Storage) -> list[str]:
    """Return the names of the runs of a storage."""
    found = (name for name in root.folders() if name.lower() not in NO_RUNS and not name.startswith("."))
    return [name for name in found if _is_run(root.child(name))]


def _is_run(folder: Storage) -> bool:
    return folder.exists(CONFIG) or bool({DATASET, SEARCH, TRAININGS, LEASES} & set(folder.folders()))


def _texts(run: Storage) -> Iterable[str]:
    """Return every text in a run's configuration and in what it began from: some are paths."""
    if run.exists(CONFIG):
        yield from _strings(_parsed(run, CONFIG))
    if run.exists(BEGINS_FROM):
        yield from _strings(_parsed(run, BEGINS_FROM))


def _place(text: str) -> str:
    try:
        return canonical(text)
    except (RuntimeError, ValueError):  # a prompt as ~nobody, or with a character that no path has
        return text


def _parsed(folder: Storage, file: str) -> Any:
    """Return the content of a YAML or JSON file.

    Raises:
        ConfigError: it is neither.
    """
    read = yaml.safe_load if file == CONFIG else json.loads
    try:
        return read(folder.read_text(file))
    except (yaml.YAMLError, json.JSONDecodeError):
        raise ConfigError(f"{folder.uri}/{file}: damaged; restore it, or delete the run") from None


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(each)


def _run(
    config: Config, name: str, root: Storage, sizes: Sizes, versions: Versions, referred: set[str]
) -> RunSpace:
    winner, ranking, reason = None, [], ""
    try:
        winner = _published(config, root, versions)
        ranking = _ranking(read_rows(root.child(SEARCH)))
    except ConfigError as error:
        reason = str(error)
    if owner := holder(root):
        reason = f"in use by {owner.describe()}"
    trainings = canonical(root.child(TRAININGS).uri) + "/"
    below = [text.removeprefix(trainings).split("/") for text in referred if text.startswith(trainings)]
    needed = {(each[0], each[1]) for each in below if len(each) > 1}
    return RunSpace(name, root, sizes, reason, winner, ranking, needed)


def _published(config: Config, root: Storage, versions: Versions) -> Place:
    """Return the winner's checkpoint of a run whose result is in the registry.

    Raises:
        ConfigError: it has no such result; says why.
    """
    search = root.child(SEARCH)
    if not search.exists(FINISHED) or TUNE in search.folders():  # or one that goes on from a result
        raise ConfigError("its search has not ended")
    if not root.exists(WINNER):
        raise ConfigError("not published")
    winner = Winner.parse(_parsed(root, WINNER), f"{root.uri}/{WINNER}")
    if winner.search_digest not in ("", result_digest(search.read_text(FINISHED))):
        raise ConfigError("not published")
    best = RungRow.parse(_parsed(search, FINISHED)["winner"], f"{search.uri}/{FINISHED}")
    model = str(winner.publish_settings.get("publish.model_name", config.publish.model_name))
    there = str(winner.publish_settings.get("publish.tracking_uri", shown_uri(config)))
    file = sqlite_file(there)
    # A file that is gone was moved with its storage. Another registry may have a version of the same number.
    if there != shown_uri(config) and (file is None or file.exists()):
        raise ConfigError(f"its {model} version {winner.registry_version} is in the registry {there}")
    if winner.registry_version is None or (model, winner.registry_version) not in versions:
        said = f"{model} version {winner.registry_version}"
        raise ConfigError(f"its {said} is not in the registry {shown_uri(config)}")
    return place_of(best.checkpoint)


def _ranking(rows: Iterable[RungRow]) -> list[list[Place]]:
    """Return the checkpoints of each candidate, the best first, by their mean score over the folds."""
    candidates: dict[tuple[str, int], list[RungRow]] = {}
    for row in rows:
        candidates.setdefault(row.place, []).append(row)

    def place(rows: list[RungRow]) -> tuple[bool, float, int]:
        mean = sum(row.score for row in rows) / len(rows)
        return math.isnan(mean), mean, rows[0].step  # what is no number would leave the others unsorted

    ranked = sorted(candidates.values(), key=place)
    return [[place_of(row.checkpoint) for row in each if row.checkpoint] for each in ranked]


def _unused(encoded: Sizes, runs: list[RunSpace]) -> tuple[str, Sizes]:
    """Return why unused encoded files cannot be told, or else these files with their bytes."""
    used: dict[str, set[str]] = {}
    for run in runs:
        if run.kept_whole.startswith("in use"):
            return f"{run.name} is {run.kept_whole}", {}
        for folder in DATASETS:
            if not any(name.startswith(f"{folder}/") for name in run.sizes):
                continue
            dataset = run.root.child(folder)
            try:
                encoders = Manifest.read(dataset).encoders if dataset.exists(MANIFEST) else ""
                if not (encoders and dataset.exists(PARTS)):
                    return f"{run.name} is not wholly prepared", {}
                files = {part["file"] for part in _parsed(dataset, PARTS)}
            except ConfigError as error:
                return str(error), {}
            used.setdefault(encoders[:16], {EMPTY_CAPTION}).update(files)
    return "", {
        f"{ENCODED}/{name}": size
        for name, size in encoded.items()
        if name.endswith(ASIDE) or name.partition("/")[2] not in used.get(name.partition("/")[0], ())
    }
