"""Compare two registry versions on the same captions and noise.

    python -m ray_jobs.compare --config configs/demo.yaml champion candidate
    python -m ray_jobs.compare --config configs/demo.yaml 3 base

A version is given by number or alias; `base` is the base model, with `model.adapter` if there is one. Both
are scored on the validation split in pairs of pictures, by the score that ranks a search
(`search.rank_by`), each at the guidance scale that it was published with (the base at
`evaluate.guidance_scale`). A version that was trained on these pictures (`search.folds`) is refused.

Writes `<storage>/<run>/comparisons/<A>-<B>/`: `comparison.json`, and `grid.png` with real pictures and those
of both versions side by side.
"""

import argparse
import io
import json
from dataclasses import asdict, dataclass

from PIL import Image

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, ModelConfig
from ray_jobs.console import say
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.preparation import prepare
from ray_jobs.evaluation.pool import EvaluatorPool, evaluators
from ray_jobs.evaluation.scores import FEWEST, Scores
from ray_jobs.metrics.resampling import PairedDifference
from ray_jobs.planning.settled import settled
from ray_jobs.registry.aliases import command_line
from ray_jobs.registry.models import RegisteredModel, registered, verify_weights
from ray_jobs.report import PictureRow, grid_image
from ray_jobs.run.command_line import run_stage
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.records import MEASURES
from ray_jobs.run.samples import SAMPLES
from ray_jobs.run.split import VALIDATION
from ray_jobs.weights.feature_networks import check_networks

BASE = "base"


@dataclass(frozen=True)
class Version:
    """One side of a comparison.

    Attributes:
        which: version number or alias as requested.
        name: display name.
        weights: location of the weights; None: the base model.
        guidance_scale: guidance scale for sampling.
        data: digest of its training data; None for the base model.
    """

    which: str
    name: str
    weights: str | None
    guidance_scale: float
    data: str | None = None


def look_up(config: Config, which: str) -> Version:
    """Find a version by number or alias, or `base`, and verify its weights.

    Raises:
        ConfigError: the version is not in the registry, was trained on another base model than this
            configuration loads, was trained on the validation split, or its weights have changed.
    """
    usual = config.evaluate.guidance_scale
    if which == BASE:
        name = "base with model.adapter" if config.model.adapter else BASE
        return Version(which, name, None, usual)
    found = registered(config, which)
    _check_base(config.model, found)
    told = found.params.get("guidance_scale")  # by older releases
    scale = found.guidance_scale if found.guidance_scale is not None else float(told) if told else None
    recorded = {"evaluate.guidance_scale": scale, "search.folds": found.folds}
    if unknown := " and ".join(name for name, value in recorded.items() if value is None):
        say("compare", f"version {found.version} does not record its {unknown}: yours is taken")
    if config.search.folds if found.folds is None else found.folds:
        raise ConfigError(
            f"search.folds: version {found.version} was trained on the validation pictures too, which "
            "would bias the comparison; compare the test FIDs of publish instead: "
            f"{command_line('status')}"
        )
    verify_weights(found, found.source)
    scale = usual if scale is None else scale
    return Version(which, f"version {found.version}", found.source, scale, found.data)


def _check_base(model: ModelConfig, found: RegisteredModel) -> None:
    """Raise ConfigError unless a version was trained on the base model that a configuration loads."""
    for name, its, ours in (
        ("base", found.base, model.base),
        ("revision", found.base_revision, model.revision),
        ("quantize", found.quantization, model.quantize),
        ("quantize_text", found.text_quantization, model.quantize_text),
    ):
        if its != ours:
            raise ConfigError(
                f"model.{name}: version {found.version} was trained with {_value(its)}, not with "
                f"{_value(ours)}; compare versions of one base model, with the configuration of one of them"
            )


def _value(setting: str | None) -> str:
    return "null" if setting is None else setting


def compare(
    config: Config, dataset: Dataset, pool: EvaluatorPool, one: Version, other: Version
) -> PairedDifference:
    """Run the stage; return how much worse `one` is than `other` by the score that ranks a search.

    Raises:
        ConfigError: there are too few pictures, or no resamples, to estimate an error.
    """
    if not config.evaluate.bootstrap:
        raise ConfigError("evaluate.bootstrap: a comparison needs errors; set it to 100, for example")
    names = [one.name, other.name]
    pool.load(VALIDATION)
    folder = RunFolder.of(config).comparison(one.which, other.which)
    folder.delete("")
    sides = [folder.child(side) for side in "AB"]
    scores: list[Scores] = []
    for version, side in zip((one, other), sides, strict=True):
        if version.data not in (None, dataset.manifest.digest):
            unsure = "it may have trained on some of these pictures"
            say("compare", f"{version.name} was trained on data other than this run's: {unsure}")
        scores.append(pool.score(version.weights, VALIDATION, side, version.guidance_scale))
        say("compare", f"{version.name}, guidance {version.guidance_scale:g}: {scores[-1].described()}")
    if scores[0].fid.num_samples < FEWEST:
        raise ConfigError(f"evaluate.num_samples: a comparison needs {FEWEST} pictures; raise it")
    measure = pool.ranked_by(VALIDATION)
    name, digits = MEASURES[measure]
    found = pool.difference(sides[0], sides[1], VALIDATION, measure=measure)
    told_apart = abs(found.value) > found.standard_error
    say(
        "compare",
        f"{names[0]} minus {names[1]}: {name} {found.value:+.{digits}f} ± {found.standard_error:.{digits}f}"
        + ("" if told_apart else ", within the error")
        + f"; sharing captions and noise makes the variance {found.variance_ratio:.1f} times smaller",
    )
    numbers = {
        version.name: score.row() | score.origin | {"guidance_scale": version.guidance_scale}
        for version, score in zip((one, other), scores, strict=True)
    }
    difference = asdict(found) | {"measure": measure}
    folder.write_text("comparison.json", json.dumps(numbers | {"difference": difference}, indent=2))
    folder.write_bytes("grid.png", _grid(dataset, pool, names, sides))
    say("compare", f"pictures: {folder.uri}/grid.png")
    return found


def _grid(dataset: Dataset, pool: EvaluatorPool, names: list[str], sides: list[Storage]) -> bytes:
    """PNG of the saved pictures next to the real ones."""
    files = pool.sample_names(VALIDATION)
    rows = []
    for row, file in zip(dataset.pictures(VALIDATION.name, len(files)), files, strict=False):
        contents = [row["image"], *(side.child(SAMPLES).read_bytes(file) for side in sides)]
        real, one, other = (Image.open(io.BytesIO(data)) for data in contents)
        rows.append(PictureRow(row["text"], real, one, other))
    sheet = io.BytesIO()
    grid_image(rows, ("real", *names)).save(sheet, format="PNG")
    return sheet.getvalue()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("one", help="version number, alias, or base")
    parser.add_argument("other", help="likewise")


def _run(config: Config, arguments: argparse.Namespace) -> None:
    config = settled(config)
    # Before the data are prepared, so that a wrong name is reported at once.
    versions = [look_up(config, name) for name in (arguments.one, arguments.other)]
    check_networks(config.evaluate)
    dataset = prepare(config)
    with evaluators(config, dataset) as pool:
        compare(config, dataset, pool, *versions)


def main(given: list[str] | None = None) -> None:
    run_stage(__doc__, _run, _arguments, name="compare", given=given)


if __name__ == "__main__":
    main()
