"""What is measured of a set of pictures: features in, numbers out.

`scores_of` is what every rung is ranked by; `further` and `near_copies` are told once, of what is published.
A record is a number as JSON takes it, with its metric, network, sample count and error (null: none is told).
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ray_jobs.metrics.efficientnet import EfficientNet
from ray_jobs.metrics.extrapolation import NUM_POINTS, fid_infinity
from ray_jobs.metrics.frechet import Moments
from ray_jobs.metrics.inception_score import inception_score
from ray_jobs.metrics.kernel import kernel_distance
from ray_jobs.metrics.neighbours import memorisation, nearest, precision_recall, share_error
from ray_jobs.metrics.ranking import enough_samples
from ray_jobs.metrics.resampling import frechet_score
from ray_jobs.metrics.score import Score
from ray_jobs.metrics.similarity import clip_score, paired_similarity
from ray_jobs.metrics.vision_model import Clip
from ray_jobs.report import number
from ray_jobs.weights.feature_networks import Networks

FEWEST = 4  # pictures of either set, below which neither a kernel distance nor an error is told
NEIGHBOURS = 3  # k of precision and recall, as in the paper
PARTS = 10  # of an Inception Score, as in the paper

Features = dict[str, np.ndarray]
"""Of one set of pictures, by the identity of the network: float32, N x D."""

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Real:
    """Real pictures as scores need them: features, and of each network their moments, made once."""

    features: Features
    moments: dict[str, Moments]

    @classmethod
    def of(cls, features: Features) -> "Real":
        found = {name: Moments.of(torch.from_numpy(each), name) for name, each in features.items()}
        return cls(features, found)


@dataclass(frozen=True)
class Scores:
    """What a set of pictures scores against real ones.

    Attributes:
        fid: by `evaluate.feature_network`, with its error.
        kid: the kernel distance by the same network; None of too few pictures.
        second: the Fréchet distance by `evaluate.second_network`; None without one.
    """

    fid: Score
    kid: Score | None
    second: Score | None

    def row(self, prefix: str = "") -> dict[str, float | None]:
        """The numbers with their errors: `fid`, `fid_error`, `kid`, ... each behind a prefix."""
        named = {"fid": self.fid, "kid": self.kid, "fid_2": self.second}
        found: dict[str, float | None] = {}
        for name, score in named.items():
            if score:
                found |= {f"{prefix}{name}": score.value, f"{prefix}{name}_error": score.standard_error}
        return found

    @property
    def origin(self) -> dict[str, str | int]:
        """What must be equal where such numbers are compared: networks, and how many pictures."""
        second = {"feature_network_2": self.second.feature_network} if self.second else {}
        return {"feature_network": self.fid.feature_network, "num_samples": self.fid.num_samples, **second}


def scores_of(generated: Features, real: Real, networks: Networks, resamples: int) -> Scores:
    """The scores that rank a set of pictures."""

    def frechet(network: str) -> Score:
        features, moments = torch.from_numpy(generated[network]), real.moments[network]
        if not resamples or len(features) < FEWEST:
            return Score.of(Moments.of(features, network), moments)
        return frechet_score(features, moments, num_resamples=resamples)

    first = networks.first.identity
    sets = torch.from_numpy(generated[first]), torch.from_numpy(real.features[first])
    kid = kernel_distance(*sets, first) if min(map(len, sets)) >= FEWEST else None
    return Scores(frechet(first), kid, frechet(networks.second.identity) if networks.second else None)


@dataclass(frozen=True)
class Copies:
    """How near generated pictures come to training pictures.

    Attributes:
        nearest: of each generated picture, the number of the nearest training picture, and its distance.
        threshold, share, expected_share: as in `metrics.neighbours.Memorisation`; None where there are no
            held-out pictures to take the threshold from.
        num_training: training pictures that were looked at.
        num_held_out: pictures that the threshold is of.
    """

    nearest: list[tuple[int, float]]
    threshold: float | None
    share: float | None
    expected_share: float | None
    num_training: int
    num_held_out: int
    feature_network: str

    def record(self) -> Record:
        found = {name: value for name, value in asdict(self).items() if name not in ("nearest", "share")}
        error = None if self.share is None else share_error(self.share, len(self.nearest))
        told = {"metric": "near copies", "value": self.share, "standard_error": error}
        return told | {"num_samples": len(self.nearest)} | found


@dataclass(frozen=True)
class Measures:
    """All that is measured of one set of pictures.

    Attributes:
        further: records beyond the scores that rank.
        left_out: what was not measured, and why, in sentences.
        copies: None where `evaluate.memorisation_pictures` is 0.
    """

    scores: Scores
    further: list[Record]
    left_out: list[str]
    copies: Copies | None

    def records(self) -> list[Record]:
        """With the share of near copies, where it is known."""
        known = self.copies and self.copies.share is not None
        return [*self.further, *([self.copies.record()] if self.copies and known else [])]


def further(
    generated: Features, real: Real, networks: Networks, captions: list[str]
) -> tuple[list[Record], list[str]]:
    """What is measured beyond the scores that rank; and what is not, and why.

    Args:
        generated, real: with features by all networks; `real` of a picture a caption.
        captions: of the real pictures; generated picture i has caption i modulo their number.
    """
    found: list[Record] = []
    left_out: list[str] = []
    first = networks.first.identity
    pictures = torch.from_numpy(generated[first])
    if pair := precision_and_recall(generated, real, first):
        found += pair
    else:
        left_out.append(f"Precision and recall need more than {NEIGHBOURS} pictures.")
    needed = max(enough_samples(networks.first.num_features), NUM_POINTS + 1)
    if len(pictures) >= needed:
        line = fid_infinity(pictures, real.moments[first])
        score = Score(line.value, len(pictures), first, line.standard_error, "fid_infinity")
        found.append(asdict(score) | {"r_squared": line.r_squared})
    else:
        left_out.append(
            f"FID is not extrapolated to infinitely many pictures: of {len(pictures):,} the fit would say"
            f" nothing, from {needed:,} on it does."
        )
    classifier = next((each for each in networks.ranking if isinstance(each, EfficientNet)), None)
    if classifier is None:
        left_out.append("No Inception Score: it needs evaluate.second_network of kind efficientnet-lite0.")
    elif len(pictures) < 2 * PARTS:
        left_out.append(f"No Inception Score: it needs {2 * PARTS} pictures.")
    else:
        classes = classifier.classes(torch.from_numpy(generated[classifier.identity]))
        found.append(asdict(inception_score(classes, classifier.identity, splits=PARTS)))
    if networks.clip:
        found += map(asdict, _clip_scores(generated, real, networks.clip, captions))
    else:
        left_out.append("No CLIP scores: evaluate.clip names no model.")
    return found, left_out


def precision_and_recall(generated: Features, real: Real, network: str) -> list[Record]:
    """Two records; none of too few pictures."""
    pictures, references = torch.from_numpy(generated[network]), torch.from_numpy(real.features[network])
    if min(len(pictures), len(references)) <= NEIGHBOURS:
        return []
    pair = precision_recall(pictures, references, network, k=NEIGHBOURS)
    shared = {name: value for name, value in asdict(pair).items() if name not in ("precision", "recall")}
    values = {"precision": (pair.precision, pair.num_samples), "recall": (pair.recall, pair.num_real)}
    return [
        {"metric": name, "value": value, "standard_error": share_error(value, count), **shared}
        for name, (value, count) in values.items()
    ]


def _clip_scores(generated: Features, real: Real, clip: Clip, captions: list[str]) -> list[Score]:
    pictures = torch.from_numpy(generated[clip.identity])
    of_caption = torch.arange(len(pictures)) % len(captions)
    texts = clip.text_features(captions)[of_caption]
    references = torch.from_numpy(real.features[clip.identity])[of_caption]
    return [
        clip_score(pictures, texts, clip.identity),
        paired_similarity(pictures, references, clip.identity),
    ]


def near_copies(generated: Features, training: Features, held_out: Features | None, network: str) -> Copies:
    """The nearest training picture of each generated one, and the share of near copies.

    Args:
        held_out: of pictures that were not trained on; None where there are none.
        network: by whose features.
    """
    pictures, seen = torch.from_numpy(generated[network]), torch.from_numpy(training[network])
    if held_out is None:
        distances, indices = (each[:, 0].tolist() for each in nearest(pictures, seen))
        return Copies(list(zip(indices, distances, strict=True)), None, None, None, len(seen), 0, network)
    unseen = torch.from_numpy(held_out[network])
    found = memorisation(pictures, seen, unseen, network)
    return Copies(
        nearest=list(zip(found.indices.tolist(), found.distances.tolist(), strict=True)),
        threshold=found.threshold,
        share=found.share,
        expected_share=found.expected_share,
        num_training=len(seen),
        num_held_out=len(unseen),
        feature_network=network,
    )


def told(found: Scores) -> str:
    """The scores for a person."""
    named = {"FID": (found.fid, 1), "KID": (found.kid, 4)}
    if found.second:
        named[f"Fréchet distance by {found.second.feature_network.split('@')[0]}"] = (found.second, 2)
    lines = []
    for name, (score, digits) in named.items():
        if score:
            lines.append(f"{name} {number(score.value, digits, score.standard_error)}")
    return ", ".join(lines)


def told_record(record: dict[str, Any]) -> str:
    """A measure for a person."""
    value = number(record["value"], 4, record["standard_error"])
    return f"{record['metric']} {value} ({record['num_samples']} pictures, {record['feature_network']})"
