"""Measures of a set of pictures: features in, numbers out.

`scores_of` ranks every rung; `more_scores` and `near_copies` are computed once, for the published weights.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from ray_jobs.metrics.corrected import Correction, corrected_difference, corrected_score
from ray_jobs.metrics.efficientnet import EfficientNet
from ray_jobs.metrics.extrapolation import NUM_POINTS, fid_infinity
from ray_jobs.metrics.frechet import Moments
from ray_jobs.metrics.inception_score import inception_score
from ray_jobs.metrics.kernel import kernel_difference, kernel_distance
from ray_jobs.metrics.neighbours import memorisation, nearest, precision_recall, share_error
from ray_jobs.metrics.ranking import enough_samples
from ray_jobs.metrics.resampling import PairedDifference, frechet_score, paired_difference
from ray_jobs.metrics.score import Score
from ray_jobs.metrics.similarity import clip_score, paired_similarity
from ray_jobs.metrics.sliced import mind_difference, mind_score
from ray_jobs.metrics.vision_model import Clip
from ray_jobs.report import number
from ray_jobs.run.records import CORRECTED, FID, KID, MEASURES, MIND, Measurement
from ray_jobs.weights.feature_networks import Networks

FEWEST = 4  # minimum pictures in either set for a kernel distance or an error estimate
NEIGHBOURS = 3  # k of precision and recall, as in the paper
PARTS = 10  # splits of an Inception Score, as in the paper

Features = dict[str, np.ndarray]
"""Features of one set of pictures, by network identity: float32, N x D."""


def measurement(score: Score, **further: float) -> Measurement:
    """Convert a score to a record, with further values of its metric."""
    return Measurement.model_validate(asdict(score) | further)


@dataclass(frozen=True, eq=False)
class Real:
    """Real pictures, prepared for scoring: features, and what is computed from them once.

    Attributes:
        moments: by network.
        correction: for the scores of so many pictures by the ranking network; None if there are too few
            training pictures.
    """

    features: Features
    moments: dict[str, Moments]
    correction: Correction | None = None

    @classmethod
    def of(cls, features: Features, correction: Correction | None = None) -> "Real":
        found = {name: Moments.of(torch.from_numpy(each), name) for name, each in features.items()}
        return cls(features, found, correction)


@dataclass(frozen=True)
class Scores:
    """Scores of a set of pictures against real ones.

    Attributes:
        fid: Fréchet distance in features of `evaluate.feature_network`, with its error.
        kid: kernel distance in the same features; None for too few pictures.
        mind: sliced Wasserstein distance in the same features, with an error as `fid`.
        second: Fréchet distance in features of `evaluate.second_network`; None without one.
        corrected: FID without the bias of the number of pictures (`metrics.corrected`); None without a
            correction for this number.
        means: the means' part of FID.
        spread: trace of the generated pictures' covariance, as a share of that of the real ones'.
    """

    fid: Score
    kid: Score | None
    mind: Score
    second: Score | None
    corrected: Score | None
    means: float
    spread: float

    def row(self, prefix: str = "") -> dict[str, float | None]:
        """Values with their errors: `fid`, `fid_error`, `kid`, ..., each name after a prefix."""
        named = {**self._ranking, "fid_2": self.second}
        found: dict[str, float | None] = {f"{prefix}fid_means": self.means, f"{prefix}spread": self.spread}
        for name, score in named.items():
            if score:
                found |= {f"{prefix}{name}": score.value, f"{prefix}{name}_error": score.standard_error}
        return found

    @property
    def _ranking(self) -> dict[str, Score | None]:
        """Scores that can rank, as `MEASURES` names them."""
        return {FID: self.fid, CORRECTED: self.corrected, KID: self.kid, MIND: self.mind}

    def described(self) -> str:
        """Format the scores for display."""
        shown = [(*MEASURES[key], score) for key, score in self._ranking.items()]
        if self.second:
            network = self.second.feature_network.split("@")[0]
            shown.append((f"Fréchet distance by {network}", 2, self.second))
        return ", ".join(
            f"{name} {number(score.value, digits, score.standard_error)}"
            for name, digits, score in shown
            if score
        )

    @property
    def origin(self) -> dict[str, str | int]:
        """Networks and number of pictures, which must be equal for two scores to be comparable."""
        second = {"feature_network_2": self.second.feature_network} if self.second else {}
        return {"feature_network": self.fid.feature_network, "num_samples": self.fid.num_samples, **second}


def scores_of(
    generated: Features, real: Real, networks: Networks, resamples: int, device: str = "cpu"
) -> Scores:
    """Compute the scores that rank a set of pictures.

    Args:
        device: device that computes Fréchet distances, whose errors take many eigenvalues, and MIND.
    """

    def frechet(network: str) -> Score:
        features, moments = torch.from_numpy(generated[network]).to(device), real.moments[network]
        if not resamples or len(features) < FEWEST:
            return Score.of(Moments.of(features, network), moments)
        return frechet_score(features, moments, num_resamples=resamples)

    first = networks.first.identity
    sets = torch.from_numpy(generated[first]), torch.from_numpy(real.features[first])
    kid = kernel_distance(*sets, first) if min(map(len, sets)) >= FEWEST else None
    second = frechet(networks.second.identity) if networks.second else None
    has_error = bool(resamples) and len(sets[0]) >= FEWEST
    mind = mind_score(sets[0].to(device), sets[1], first, has_error=has_error)
    moments, correction, corrected = real.moments[first], real.correction, None
    if correction and correction.count == len(sets[0]):
        corrected = corrected_score(sets[0].to(device), moments, correction, num_resamples=resamples)
    drawn = Moments.of(sets[0], first)
    means = float((drawn.mean - moments.mean).square().sum())
    return Scores(frechet(first), kid, mind, second, corrected, means, drawn.trace / moments.trace)


def difference_by(
    measure: str, one: torch.Tensor, other: torch.Tensor, real: Real, network: str, *, resamples: int
) -> PairedDifference:
    """Compare two candidates on common captions and noise by a score that can rank.

    Args:
        measure: one of `records.MEASURES`.
        one, other: features from the ranking network, whose identity is `network`: float, N x D each.
        resamples: as `evaluate.bootstrap`.
    """
    moments, references = real.moments[network], torch.from_numpy(real.features[network]).to(one.device)
    if measure == KID:
        return kernel_difference(one, other, references, network)
    if measure == MIND:
        return mind_difference(one, other, references, network)
    if measure == CORRECTED:
        assert real.correction is not None
        return corrected_difference(one, other, moments, real.correction, num_resamples=resamples)
    assert measure == FID
    return paired_difference(one, other, moments, num_resamples=resamples)


@dataclass(frozen=True)
class Copies:
    """Distances from generated pictures to their nearest training pictures.

    Attributes:
        nearest: number of the nearest training picture and its distance, for each generated picture.
        threshold, share, expected_share: as in `metrics.neighbours.Memorisation`; None if there are no
            held-out pictures to compute the threshold from.
        num_training: number of training pictures searched.
        num_held_out: number of pictures that the threshold is computed from.
    """

    nearest: list[tuple[int, float]]
    threshold: float | None
    share: float | None
    expected_share: float | None
    num_training: int
    num_held_out: int
    feature_network: str

    def record(self) -> Measurement:
        found = {name: value for name, value in asdict(self).items() if name not in ("nearest", "share")}
        error = None if self.share is None else share_error(self.share, len(self.nearest))
        told = {"metric": "near copies", "value": self.share, "standard_error": error}
        return Measurement.model_validate(told | {"num_samples": len(self.nearest)} | found)


@dataclass(frozen=True)
class SetScores:
    """Complete measures of one set of pictures.

    Attributes:
        further: records beyond the ranking scores.
        left_out: measures that were not computed and the reasons, as sentences.
        copies: near copies; None if `evaluate.memorisation_pictures` is 0.
    """

    scores: Scores
    further: list[Measurement]
    left_out: list[str]
    copies: Copies | None

    def records(self) -> list[Measurement]:
        """Further records, plus the share of near copies if it is known."""
        known = self.copies and self.copies.share is not None
        return [*self.further, *([self.copies.record()] if self.copies and known else [])]


def more_scores(
    generated: Features, real: Real, networks: Networks, captions: list[str]
) -> tuple[list[Measurement], list[str]]:
    """Compute the measures beyond the ranking scores; return them and the reasons for those left out.

    Args:
        generated, real: sets with features from all networks; `real` has one picture per caption.
        captions: captions of the real pictures; generated picture i has caption i modulo their number.
    """
    found: list[Measurement] = []
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
        found.append(measurement(score, r_squared=line.r_squared))
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
        found.append(measurement(inception_score(classes, classifier.identity, splits=PARTS)))
    if networks.clip:
        found += map(measurement, _clip_scores(generated, real, networks.clip, captions))
    else:
        left_out.append("No CLIP scores: evaluate.clip names no model.")
    return found, left_out


def precision_and_recall(generated: Features, real: Real, network: str) -> list[Measurement]:
    """Records of precision and of recall; an empty list for too few pictures."""
    pictures, references = torch.from_numpy(generated[network]), torch.from_numpy(real.features[network])
    if min(len(pictures), len(references)) <= NEIGHBOURS:
        return []
    pair = precision_recall(pictures, references, network, k=NEIGHBOURS)
    shared = {name: value for name, value in asdict(pair).items() if name not in ("precision", "recall")}
    values = {"precision": (pair.precision, pair.num_samples), "recall": (pair.recall, pair.num_real)}
    return [
        Measurement.model_validate(
            {"metric": name, "value": value, "standard_error": share_error(value, count), **shared}
        )
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
    """Find the nearest training picture of each generated one, and the share of near copies.

    Args:
        held_out: features of pictures that were not trained on; None if there are none.
        network: identity of the network whose features are compared.
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


def describe_record(record: Measurement) -> str:
    """Format a measurement for display."""
    value = number(record.value, 4, record.standard_error)
    return f"{record.metric} {value} ({record.num_samples} pictures, {record.feature_network})"
