"""Register weights that were trained elsewhere, or a base without any training, as a version of the registry.

    python -m ray_jobs.import_weights --config configs/demo.yaml --adapter downloads/style.safetensors
    python -m ray_jobs.import_weights --config configs/demo.yaml --adapter organisation/style --revision v2
    python -m ray_jobs.import_weights --config configs/demo.yaml --adapter first=0.8 --adapter second=0.5
    python -m ray_jobs.import_weights --config configs/demo.yaml --model organisation/model
    python -m ray_jobs.import_weights --config configs/demo.yaml --model downloads/checkpoint.safetensors
    python -m ray_jobs.import_weights --config configs/demo.yaml --adapter organisation/style --measure

The version's name is `publish.model_name`, and an adapter's base `model.base`. Adapters may have the names of
diffusers, kohya's programs, ComfyUI or ai-toolkit; of several the weighted sum is registered, with `--rank`
the nearest adapter of that rank. A checkpoint in one file needs `model.base`, a model in diffusers' format of
the same layers, for its configurations and tokenizers. Without `--measure` such a version becomes champion
where there is none, and otherwise by `python -m ray_jobs.versions promote`; with it, it is scored on the test
split of the configuration's data, beside `model.base`, and becomes champion by its score, as a trained one.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.connect import connect
from cluster.fetched import local_path, without_keys
from cluster.lease import held
from cluster.watch import watched
from ray_jobs.config import Config, ConfigError, LoraConfig, add_config_arguments, load_config
from ray_jobs.console import complain, show
from ray_jobs.console.commands import command_parser
from ray_jobs.data.preparation import prepare
from ray_jobs.diffusion.families import family_of
from ray_jobs.evaluation.pool import evaluators
from ray_jobs.planning.settled import settled
from ray_jobs.publishing.imported import Scored, measure_imported, shared_copy
from ray_jobs.registry.registration import Registered, register
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.records import FID
from ray_jobs.weights.adapter_files import low_rank_layers, tensors_of
from ray_jobs.weights.combining import combined, reduced
from ray_jobs.weights.feature_networks import check_networks
from ray_jobs.weights.given_adapters import file_digest, given_file, own_part, read_given, require_places
from ray_jobs.weights.loading import empty_model, read_index
from ray_jobs.weights.model_files import UNUSED, check_weights, model_folder
from ray_jobs.weights.model_index import write_index
from ray_jobs.weights.saving import copy_parts, write_adapter
from ray_jobs.weights.schedulers import has_scheduler
from ray_jobs.weights.single_file import read_single_file

ADAPTER, MODEL = "--adapter", "--model"


@dataclass(frozen=True)
class Imported:
    """Weights in diffusers' format, and where they are from.

    Attributes:
        method: lora, or full for a whole model.
        tags: provenance, for the registry.
        notes: what the user should know, line by line.
        base: its name as a model that is its own base; None: it is a version of `model.base`.
    """

    folder: Path
    method: str
    tags: dict[str, str]
    notes: list[str] = field(default_factory=list)
    base: str | None = None


@contextmanager
def imported_adapter(
    config: Config, names: Sequence[str], revision: str | None = None, rank: int | None = None
) -> Iterator[Imported]:
    """Provide an adapter in diffusers' format, made of one or several.

    Args:
        names: files, folders or hub names; of several each may have a weight, `name=0.5`.
        rank: largest rank of the common adapter of several; None: the sum of theirs.

    Raises:
        ValueError: a file is no adapter of `model.base`; names what does not fit.
    """
    base, base_revision = local_path(config.model.base), config.model.revision
    family = family_of(read_index(base, base_revision)["_class_name"])
    components = [*family.denoisers, *family.text.encoders]
    model = empty_model(base, components, revision=base_revision)
    parts = {each: getattr(model, each) for each in components if getattr(model, each) is not None}
    found, digests, sources, notes = [], [], list[str](), list[str]()
    for given in names:
        name, weight = _weighted(given)
        sources.append(without_keys(name) + given.removeprefix(name))
        file = given_file(name, revision, ADAPTER)
        tensors, settings = read_given(file, family, parts[family.denoiser], ADAPTER)
        require_places(tensors, parts, file, ADAPTER)
        if has_scheduler(file.parent):
            raise ValueError(
                f"{ADAPTER}: {file}: it has a scheduler of its own; give it as model.adapter to "
                "train it further, or register it where it was published"
            )
        found.append((tensors, settings, weight))
        digests.append(file_digest(file))
    tensors, settings, weight = found[0]
    if len(found) > 1 or rank is not None or weight != 1:
        layers = combined([(low_rank_layers(tensors, own), weight) for tensors, own, weight in found])
        if rank is not None:
            layers, error = reduced(layers, rank)
            notes.append(f"rank {rank}: {error:.2%} of the update's norm is left out")
        tensors, settings = tensors_of(layers), {}
    layers_of = {each: own_part(tensors, each) for each in sorted({key.partition(".")[0] for key in tensors})}
    with tempfile.TemporaryDirectory(prefix="diffray-import-") as folder:
        write_adapter(Path(folder), layers_of, {each: own_part(settings, each) for each in layers_of})
        tags = {"imported_from": ", ".join(sources), "imported_digest": ", ".join(digests)}
        tags |= {"imported_revision": revision} if revision else {}
        yield Imported(Path(folder), "lora", tags, notes)


def _weighted(name: str) -> tuple[str, float]:
    """Split `name=0.5` into the name and the weight; 1 if there is none."""
    before, mark, after = name.rpartition("=")
    try:
        return (before, float(after)) if mark else (name, 1.0)
    except ValueError:
        return name, 1.0


@contextmanager
def imported_model(config: Config, name: str, revision: str | None = None) -> Iterator[Imported]:
    """Provide a whole model in diffusers' format, with plain weights.

    Args:
        name: folder or hub name of a model, or a checkpoint in one file.

    Raises:
        ValueError: it is no model of a known family, or its weights are in no supported format.
    """
    place, tags = Path(local_path(name, MODEL)), {"imported_from": without_keys(name)}
    with tempfile.TemporaryDirectory(prefix="diffray-import-") as folder:
        target = Path(folder) / "model"
        if place.is_file():
            tags["imported_digest"] = file_digest(place)
            read_single_file(place, local_path(config.model.base), target, config.model.revision)
        else:
            family_of(read_index(str(place), revision)["_class_name"])
            check_weights(str(place), revision=revision)
            source = model_folder(str(place), revision=revision, without=UNUSED)
            target.mkdir()
            copy_parts(source, target)
            write_index(source, target)
        tags |= {"imported_revision": revision} if revision else {}
        yield Imported(target, "full", tags, base=None if place.is_file() else name)


def register_imported(
    config: Config, imported: Imported, source: str = "", scored: Scored | None = None
) -> Registered:
    """Register imported weights as a version of `publish.model_name`.

    Args:
        source: where they are, if not in `imported.folder`.
        scored: from `measure_imported`; None: they are not measured.
    """
    name, scale = imported.tags["imported_from"], config.evaluate.guidance_scale
    measured, paired, metrics = scored or (None, None, {})
    train = config.train.model_copy(update={"method": imported.method, "lora": LoraConfig()})
    config = config.model_copy(update={"train": train})
    if imported.base is not None:
        own = {"base": imported.base, "revision": imported.tags.get("imported_revision"), "quantize": None}
        config = config.model_copy(update={"model": config.model.model_copy(update=own)})
    params = {"method": imported.method, "base": config.model.base, **imported.tags}
    how = "not measured"
    if measured:
        how = f"test FID {measured.told(FID)}"
        params["guidance_scale"] = f"{scale:g}"
    return register(
        config,
        source=source or str(imported.folder),
        measured=measured,
        params=params,
        metrics=metrics,
        description=f"Imported from {name}; {how}.",
        paired=paired,
        tags=imported.tags,
    )


def register_measured(config: Config, imported: Imported) -> Registered:
    """Measure imported weights on the test split of the configuration's data, and register them."""
    config = settled(config)
    check_networks(config.evaluate)
    with (
        connect(config, "evaluate") as nodes,
        watched(config, nodes, "evaluate"),
        held(RunFolder.of(config).root),
    ):
        dataset, folder = prepare(config), shared_copy(config, imported.folder)
        try:
            with evaluators(config, dataset) as pool:
                scored = measure_imported(config, dataset, pool, folder)
            return register_imported(config, imported, folder.uri, scored)
        finally:
            folder.delete("")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code, 2 for an error that the user must fix."""
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument(
        ADAPTER,
        action="append",
        metavar="NAME[=WEIGHT]",
        help="a file, a folder or a name on the Hub; repeated, their weighted sum is registered",
    )
    kinds.add_argument(MODEL, help="a folder or a name on the Hub, or a checkpoint in one file")
    parser.add_argument("--revision", help="on the Hub")
    parser.add_argument(
        "--measure", action="store_true", help="score it on the test split of the configuration's data"
    )
    parser.add_argument("--rank", type=int, help="of the sum of several adapters; by default of them all")
    arguments = parser.parse_args(argv)
    try:
        if arguments.rank is not None and (arguments.model or arguments.rank < 1):
            raise ConfigError("--rank: give a rank of at least 1, of adapters")
        config = load_config(arguments.config, arguments.overrides)
        provided = (
            imported_model(config, arguments.model, arguments.revision)
            if arguments.model
            else imported_adapter(config, arguments.adapter, arguments.revision, arguments.rank)
        )
        with provided as imported:
            registered = (register_measured if arguments.measure else register_imported)(config, imported)
    except ConfigError as error:
        return complain(error)
    except ValueError as error:
        return complain(ConfigError(" ".join(str(error).split())))
    for note in imported.notes:
        show(f"import: {note}")
    show(f"import: version {registered.version} of {config.publish.model_name!r}: {registered.message}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
