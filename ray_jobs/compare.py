"""Compare: two versions of the registry on the same captions and the same noise.

    python -m ray_jobs.compare --config configs/demo.yaml champion candidate
    python -m ray_jobs.compare --config configs/demo.yaml 3 base

Versions by number or alias; `base` is the base model. Both are measured on the validation split, picture by
picture. Writes `<storage>/<run>/comparisons/<A>-<B>/`: `comparison.json`, and `grid.png` with real pictures
and both versions' side by side.
"""

import argparse
import io
import json
from dataclasses import asdict

from PIL import Image

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.dataset import Dataset
from ray_jobs.evaluate import SAMPLES, EvaluatorPool, evaluators, told
from ray_jobs.evaluator import FEWEST, Scores
from ray_jobs.metrics.resampling import PairedDifference
from ray_jobs.prepare import prepare
from ray_jobs.progress import say
from ray_jobs.registry import registered, verify_weights
from ray_jobs.report import PictureRow, grid_image
from ray_jobs.stage import run_stage

BASE = "base"


def compare(config: Config, dataset: Dataset, pool: EvaluatorPool, one: str, other: str) -> PairedDifference:
    """Run the stage; returns by how much the FID of `one` is above that of `other`.

    Raises:
        ConfigError: a version is not in the registry, or belongs to another base model; or there are too few
            pictures, or no resamples, to tell an error.
    """
    if config.evaluate.bootstrap < 2:
        raise ConfigError("evaluate.bootstrap: a comparison needs the error of a difference; set it to 100")
    names = [name if name == BASE else f"version {registered(config, name).version}" for name in (one, other)]
    weights = [_weights(config, name) for name in (one, other)]
    pool.load("validation")
    folder = Storage.open(config.storage).child(config.name, "comparisons", f"{one}-{other}")
    folder.delete("")
    sides = [folder.child(side) for side in "AB"]
    scores: list[Scores] = []
    for name, source, side in zip(names, weights, sides, strict=True):
        scores.append(pool.score(source, "validation", side))
        say("compare", f"{name}: {told(scores[-1])}")
    if scores[0].fid.num_samples < FEWEST:
        raise ConfigError(f"evaluate.num_samples: a comparison needs {FEWEST} pictures; raise it")
    found = pool.difference(sides[0], sides[1], "validation")
    told_apart = abs(found.value) > found.standard_error
    say(
        "compare",
        f"{names[0]} less {names[1]}: {found.value:+.1f} ± {found.standard_error:.1f}"
        + ("" if told_apart else ", not told apart")
        + f"; the common noise makes the variance {found.variance_ratio:.1f} times smaller",
    )
    numbers = {name: score.row() for name, score in zip(names, scores, strict=True)}
    folder.write_text("comparison.json", json.dumps(numbers | {"difference": asdict(found)}, indent=2))
    folder.write_bytes("grid.png", _grid(dataset, pool, names, sides))
    say("compare", f"pictures: {folder.uri}/grid.png")
    return found


def _weights(config: Config, which: str) -> str | None:
    """Where a version's weights are; None for the base model."""
    if which == BASE:
        return None
    version = registered(config, which)
    if version.base != config.model.base:
        raise ConfigError(
            f"{which}: version {version.version} belongs to {version.base}, not to model.base ("
            f"{config.model.base}); compare versions of one base model"
        )
    verify_weights(version, version.source)
    return version.source


def _grid(dataset: Dataset, pool: EvaluatorPool, names: list[str], sides: list[Storage]) -> bytes:
    """The kept pictures beside the real ones: PNG."""
    files = pool.sample_names("validation")
    rows = []
    for row, file in zip(dataset.pictures("validation", len(files)), files, strict=False):
        contents = [row["image"], *(side.child(SAMPLES).read_bytes(file) for side in sides)]
        rows.append(PictureRow(row["text"], *(Image.open(io.BytesIO(data)) for data in contents)))
    sheet = io.BytesIO()
    grid_image(rows, ("real", *names)).save(sheet, format="PNG")
    return sheet.getvalue()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("one", help="version number, alias, or base")
    parser.add_argument("other", help="likewise")


def _run(config: Config, arguments: argparse.Namespace) -> None:
    for name in (arguments.one, arguments.other):
        _weights(config, name)  # a wrong name is told at once
    dataset = prepare(config)
    with evaluators(config, dataset) as pool:
        compare(config, dataset, pool, arguments.one, arguments.other)


if __name__ == "__main__":
    run_stage(__doc__, _run, _arguments)
