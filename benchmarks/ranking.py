"""python -m benchmarks.ranking [--run runs/demo] [--pictures 1024] [--steps N] [--features FILE]

How often each score that can rank (`search.rank_by`) chooses from few pictures the candidate that it chooses
from all, and the one that the corrected FID chooses from all.

Candidates are the rungs of a run (`--run`), judged by its validation pictures as in its search, or the
demo's base at six guidance scales, judged by a third of the example's pictures. Each draws the same captions
from the same noise. Few pictures are random subsets without replacement, of the same picture numbers for all
candidates. The lowest score is chosen; that a search prefers fewer steps within the error is left out.

The regret is how much higher the chosen candidate's score of all pictures is than the lowest: of the same
score, and of the corrected FID. KID is that of the whole subset, which a search's is on average over random
halves. The corrected FID of all pictures is the mean over equal parts, as it needs a further real picture for
each picture of a part.

Drawing takes most of the time. `--features` writes the features to a file, or takes them from it if it is
there.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.serving_faster import read_example
from cluster.storage import Storage
from ray_jobs.config import Config, load_config
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.actor import Evaluator
from ray_jobs.metrics.corrected import Correction, corrected_distance
from ray_jobs.metrics.frechet import Moments
from ray_jobs.metrics.kernel import squared_mmd
from ray_jobs.metrics.resampling import ReweightedFrechet
from ray_jobs.metrics.sliced import sliced_distance
from ray_jobs.pictures.reading import encode_png
from ray_jobs.run.folder import CONFIG, RunFolder
from ray_jobs.run.manifest import Manifest
from ray_jobs.run.records import CORRECTED, FID, KID, MEASURES, MIND
from ray_jobs.training.checkpoint import find_rungs

DEMO = "configs/demo.yaml"
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
SIZES = (32, 64, 128, 256)
DRAWS = 100  # subsets of each size
EXAMPLE = 672  # pictures; a third is compared with, the others tell the correction
REAL, OTHERS = "real", "others"
OF_SETS = (FID, CORRECTED, KID, MIND)  # scores of sets of pictures of any kind

Features = dict[str, torch.Tensor]
"""Of real pictures (`REAL`, `OTHERS`) and of each candidate, by name: float32, N x D."""


class Candidate(NamedTuple):
    """What draws pictures; None: the base, or the configuration's guidance scale."""

    name: str
    weights: str | None
    guidance_scale: float | None


class Pictures(NamedTuple):
    """PNGs of real pictures that scores are against, their captions, and further real pictures."""

    real: list[bytes]
    captions: list[str]
    others: list[bytes]


@dataclass(frozen=True)
class Row:
    """Outcome of one score from subsets of `pictures`.

    Attributes:
        chooses: share of subsets whose choice is that of the same score from all pictures.
        regret: mean of that score above the lowest, of all pictures.
        chooses_corrected, regret_corrected: the same by the corrected FID of all pictures.
    """

    measure: str
    pictures: int
    chooses: float
    regret: float
    chooses_corrected: float
    regret_corrected: float

    def __str__(self) -> str:
        name, digits = MEASURES[self.measure]
        return (
            f"{name:>13}  {self.pictures:8}  {self.chooses:7.0%}  {self.regret:8.{digits}f}  "
            f"{self.chooses_corrected:13.0%}  {self.regret_corrected:8.1f}"
        )


HEADER = f"{'':>13}  pictures  as itself    regret  as corrected    regret"


class Judge:
    """Scores of subsets of the candidates' pictures."""

    def __init__(self, features: Features) -> None:
        self.real, self.others = features[REAL], features[OTHERS]
        self.moments = Moments.of(self.real)
        self.candidates = [each for name, each in features.items() if name not in (REAL, OTHERS)]
        self.distances = [ReweightedFrechet(each, self.moments) for each in self.candidates]
        self._corrections: dict[int, Correction] = {}

    def score(self, measure: str, candidate: int, chosen: torch.Tensor) -> float:
        """Score the pictures of these numbers."""
        pictures = self.candidates[candidate][chosen]
        if measure == KID:
            return squared_mmd(pictures, self.real)
        if measure == MIND:
            return sliced_distance(pictures, self.real)
        if measure == CORRECTED:
            parts = pictures.split(math.ceil(len(pictures) / math.ceil(len(pictures) / len(self.others))))
            return float(np.mean([self._corrected(part) for part in parts]))
        assert measure == FID
        counts = torch.zeros(len(self.candidates[candidate]), dtype=torch.int64).scatter(0, chosen, 1)
        return self.distances[candidate](counts)

    def _corrected(self, pictures: torch.Tensor) -> float:
        count = len(pictures)
        if count not in self._corrections:
            found = Correction.of(self.real, self.others, count)
            assert found is not None
            self._corrections[count] = found
        return corrected_distance(pictures, self.moments, self._corrections[count])

    def scores(self, measure: str, chosen: torch.Tensor) -> torch.Tensor:
        """Score the pictures of these numbers of each candidate: float64, K."""
        found = [self.score(measure, number, chosen) for number in range(len(self.candidates))]
        return torch.tensor(found, dtype=torch.float64)


def choices(scores: torch.Tensor, whole: torch.Tensor) -> tuple[float, float]:
    """Return how often the lowest score is that of the best candidate, and the mean regret.

    Args:
        scores: of subsets, float64, draws x K.
        whole: of all pictures, float64, K.
    """
    chosen = scores.argmin(dim=1)
    share = (chosen == whole.argmin()).double().mean()
    return float(share), float((whole[chosen] - whole.min()).mean())


def rank(features: Features, sizes: Sequence[int], draws: int) -> tuple[dict[str, list[float]], list[Row]]:
    """Return each candidate's score of all pictures, by measure, and the outcomes of subsets.

    Raises:
        ValueError: a size is more than half of the pictures, so that its subsets would be much the same.
    """
    judge = Judge(features)
    count = len(judge.candidates[0])
    if max(sizes) > count // 2:
        raise ValueError(f"--sizes: {max(sizes)} is more than half of the {count} pictures; draw more")
    whole = {measure: judge.scores(measure, torch.arange(count)) for measure in OF_SETS}
    generator = torch.Generator().manual_seed(0)
    rows = []
    for size in sizes:
        subsets = [torch.randperm(count, generator=generator)[:size] for _ in range(draws)]
        for measure in OF_SETS:
            scores = torch.stack([judge.scores(measure, chosen) for chosen in subsets])
            own, corrected = choices(scores, whole[measure]), choices(scores, whole[CORRECTED])
            rows.append(Row(measure, size, *own, *corrected))
    return {measure: each.tolist() for measure, each in whole.items()}, rows


def of_run(config: Config) -> tuple[list[Candidate], Pictures]:
    """Return the rungs of a run, and the pictures that its search judged them by."""
    run, dataset = RunFolder.of(config), Dataset.of_run(config)
    assert dataset, f"{run.dataset.uri}: not prepared"
    judged = dataset.pictures("validation", config.evaluate.num_samples)
    others = dataset.pictures("train", dataset.manifest.train)
    candidates = [
        Candidate(f"{training} at step {rung.step}", rung.weights, None)
        for training, rungs in find_rungs(run.trainings).items()
        for rung in rungs
    ]
    return candidates, Pictures(
        [row["image"] for row in judged], [row["text"] for row in judged], [row["image"] for row in others]
    )


def of_base() -> tuple[list[Candidate], Pictures]:
    """Return the base at several guidance scales, and the example's pictures."""
    pixels, captions = read_example(EXAMPLE)
    pictures = [encode_png(each.permute(1, 2, 0).numpy()) for each in pixels]
    third = slice(None, None, 3)
    others = [picture for number, picture in enumerate(pictures) if number % 3]
    candidates = [Candidate(f"guidance {scale:g}", None, scale) for scale in GUIDANCE_SCALES]
    return candidates, Pictures(pictures[third], captions[third], others)


def draw(evaluator: Evaluator, candidates: Sequence[Candidate], pictures: Pictures, count: int) -> Features:
    """Return the ranking network's features of all pictures; each candidate draws `count`."""
    network = evaluator.networks.first.identity
    found = {
        name: torch.from_numpy(evaluator.picture_features(part)[network])
        for name, part in ((REAL, pictures.real), (OTHERS, pictures.others))
    }
    captions = [pictures.captions[number % len(pictures.captions)] for number in range(count)]
    for name, weights, scale in candidates:
        drawn = evaluator.sample_features(weights, captions, list(range(count)), None, scale)
        found[name] = torch.from_numpy(drawn[network])
        print(f"{name}: {count:,} pictures drawn", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder of a run; its rungs are the candidates")
    parser.add_argument("--pictures", type=int, default=1024, help="that each candidate draws")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the configuration's")
    parser.add_argument("--candidates", type=int, help="only so many, evenly chosen")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="pictures of a subset")
    parser.add_argument("--draws", type=int, default=DRAWS, help="subsets of each size")
    parser.add_argument("--features", type=Path, help="safetensors file to write, or to read if it exists")
    arguments = parser.parse_args()
    if arguments.features and arguments.features.exists():
        features = load_file(arguments.features)
    else:
        run, path, overrides = arguments.run, DEMO, ["evaluate.second_network=null"]
        if run:
            path = str(run / CONFIG)
            overrides += [f"storage={run.resolve().parent}", f"name={run.resolve().name}"]
        if arguments.steps:
            overrides.append(f"evaluate.inference_steps={arguments.steps}")
        config = load_config(path, overrides)
        candidates, pictures = of_run(config) if run else of_base()
        if wanted := arguments.candidates:
            places = np.linspace(0, len(candidates) - 1, wanted).round().astype(int)
            candidates = [candidates[place] for place in places]
        storage = Storage.open(config.storage)
        evaluator = Evaluator(config, Dataset(storage, storage, Manifest()), torch.get_num_threads())
        features = draw(evaluator, candidates, pictures, arguments.pictures)
        if arguments.features:
            save_file(features, arguments.features)
    whole, rows = rank(features, arguments.sizes, arguments.draws)
    names = [name for name in features if name not in (REAL, OTHERS)]
    for number, name in enumerate(names):
        told = ", ".join(
            f"{MEASURES[measure].name} {each[number]:.{MEASURES[measure].digits}f}"
            for measure, each in whole.items()
        )
        print(f"{name}: {told}")
    print(HEADER)
    for row in rows:
        print(row)
    print(f"JSON {json.dumps({'candidates': names, 'whole': whole, 'rows': [asdict(row) for row in rows]})}")


if __name__ == "__main__":
    main()
