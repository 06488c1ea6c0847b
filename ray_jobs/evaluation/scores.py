"""Measures of a set of pictures: features in, numbers out.

`scores_of` ranks every rung; `more_scores` and `near_copies` are computed once, for the published weights.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import fmean

import numpy as np
import torch

from ray_jobs.metrics.control import (
    DISAGREEMENT,
    Controlled,
    Scale,
    control_difference,
    control_score,
    disagreement_score,
)
from ray_jobs.metrics.copies import CopyDetector, DetectorFacts
from ray_jobs.metrics.corrected import Correction, corrected_difference, corrected_score
from ray_jobs.metrics.edits import OUTSIDE, outside_score, target_difference, target_distance
from ray_jobs.metrics.efficientnet import EfficientNet
from ray_jobs.metrics.extrapolation import NUM_POINTS, fid_infinity
from ray_jobs.metrics.feature_network import FeatureNetwork
from ray_jobs.metrics.frechet import Moments
from ray_jobs.metrics.inception_score import inception_score
from ray_jobs.metrics.kernel import kernel_difference, kernel_distance
from ray_jobs.metrics.neighbours import precision_recall, share_error
from ray_jobs.metrics.preference import mean_reward, preference_difference, preference_gap
from ray_jobs.metrics.ranking import enough_samples
from ray_jobs.metrics.resampling import PairedDifference, frechet_score, paired_difference
from ray_jobs.metrics.score import Score
from ray_jobs.metrics.similarity import clip_score, paired_similarity
from ray_jobs.metrics.sliced import mind_difference, mind_score
from ray_jobs.metrics.subject import SubjectScore
from ray_jobs.metrics.vision_model import Clip
from ray_jobs.report import number
from ray_jobs.run.records import (
    CONTROL,
    COPIES,
    CORRECTED,
    EARLIER_VOTES,
    FID,
    KID,
    MEASURES,
    MIND,
    OWN,
    PREFERENCE,
    RECITED,
    SUBJECT,
    TARGET,
    VOTES,
    Measurement,
)
from ray_jobs.weights.feature_networks import Networks

FEWEST = 4  # minimum pictures in either set for a kernel distance or an error estimate
NEIGHBOURS = 3  # k of precision and recall, as in the paper
BLACK_SIDE = 64  # pixels of a black picture, whose features are the same at any size
ALIKE = 1e-2  # distance of equal pictures' features, as a share of their size: kernels round differently
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
        rewards: of these pictures for their captions, by identity of the reward model: float32, N x 1.
        are_targets: True if they are what reference pictures are to become.
        scale: of the control score; None without control images, or while it is measured.
        correction: for the scores of so many pictures by the ranking network; None if there are too few
            training pictures.
    """

    features: Features
    moments: dict[str, Moments]
    correction: Correction | None = None
    rewards: Features = field(default_factory=dict)
    are_targets: bool = False
    scale: Scale | None = None

    @classmethod
    def of(
        cls,
        features: Features,
        correction: Correction | None = None,
        rewards: Features | None = None,
        *,
        are_targets: bool = False,
    ) -> "Real":
        found = {name: Moments.of(torch.from_numpy(each), name) for name, each in features.items()}
        return cls(features, found, correction, rewards or {}, are_targets)

    def correction_for(self, count: int) -> Correction | None:
        """Return the correction for scores of so many pictures, if it is for these."""
        return self.correction if self.correction and self.correction.count == count else None


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
        preference: how much less the pictures are liked than the real ones of their captions; None without a
            reward model, or without captions.
        spread: trace of the generated pictures' covariance, as a share of that of the real ones'.
        target: how far edits are from what they should be (`metrics.edits`); None without references.
        outside: how much edits change what they should leave alone; None without such pixels.
        disagreement: how far pictures are from their control images (`metrics.control`); None without these,
            or if nothing says how they are computed.
        control: FID and disagreement together; None also for what sets its scale.
        votes: share of held-out votes that the implicit rewards order wrongly; None without votes.
        earlier_votes: the same of votes of earlier rounds.
        black: number of pictures that are black.
        subject: how well subjects are drawn (`metrics.subject`); None if that is not asked for.
    """

    fid: Score
    kid: Score | None
    mind: Score
    second: Score | None
    corrected: Score | None
    means: float
    spread: float
    preference: Score | None = None
    target: Score | None = None
    outside: Score | None = None
    disagreement: Score | None = None
    control: Score | None = None
    votes: Score | None = None
    earlier_votes: Score | None = None
    black: int = 0
    subject: SubjectScore | None = None

    def row(self, prefix: str = "") -> dict[str, float | None]:
        """Values with their errors: `fid`, `fid_error`, `kid`, ..., each name after a prefix."""
        named = {
            **self._ranking,
            "fid_2": self.second,
            "outside": self.outside,
            "disagreement": self.disagreement,
            **(self.subject.parts if self.subject else {}),
        }
        found: dict[str, float | None] = {f"{prefix}fid_means": self.means, f"{prefix}spread": self.spread}
        for name, score in named.items():
            if score:
                found |= {f"{prefix}{name}": score.value, f"{prefix}{name}_error": score.standard_error}
        return found

    @property
    def _ranking(self) -> dict[str, Score | None]:
        """Scores that can rank, as `MEASURES` names them."""
        subject = self.subject.total if self.subject else None
        distances = {FID: self.fid, CORRECTED: self.corrected, KID: self.kid, MIND: self.mind}
        votes = {VOTES: self.votes, EARLIER_VOTES: self.earlier_votes}
        edits = {TARGET: self.target, CONTROL: self.control}
        return {**distances, PREFERENCE: self.preference, **edits, **votes, SUBJECT: subject}

    def described(self) -> str:
        """Format the scores for display."""
        shown = [(*MEASURES[key], score) for key, score in self._ranking.items()]
        if self.second:
            network = self.second.feature_network.split("@")[0]
            shown.append((f"Fréchet distance by {network}", 2, self.second))
        shown.append((DISAGREEMENT, 3, self.disagreement))
        return ", ".join(
            f"{name} {number(score.value, digits, score.standard_error)}"
            for name, digits, score in shown
            if score
        )

    @property
    def origin(self) -> dict[str, str | int]:
        """Networks and number of pictures, which must be equal for two scores to be comparable."""
        others = {"feature_network_2": self.second} if self.second else {}
        if self.subject:
            others["subject_network"] = self.subject.total
        if self.preference:
            others["preference_model"] = self.preference
        networks = {name: score.feature_network for name, score in others.items()}
        return {"feature_network": self.fid.feature_network, "num_samples": self.fid.num_samples, **networks}


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
    moments, correction, corrected = real.moments[first], real.correction_for(len(sets[0])), None
    if correction:
        corrected = corrected_score(sets[0].to(device), moments, correction, num_resamples=resamples)
    drawn = Moments.of(sets[0], first)
    means = float((drawn.mean - moments.mean).square().sum())
    preference = next(
        (
            preference_gap(torch.from_numpy(generated[model][:, 0]), torch.from_numpy(rewards[:, 0]), model)
            for model, rewards in real.rewards.items()
            if model in generated
        ),
        None,
    )
    share = drawn.trace / moments.trace
    target = target_distance(*sets, first) if real.are_targets else None
    outside = None
    if OUTSIDE in generated:
        outside = outside_score(torch.from_numpy(generated[OUTSIDE][:, 0]), len(sets[0]))
    disagreement, control = None, None
    if DISAGREEMENT in generated:
        own = controlled(generated, first, device)
        disagreement = disagreement_score(own.apart)
        if real.scale:
            halves = resamples if has_error else 0
            control = control_score(own, moments, correction, real.scale, num_resamples=halves)
    return Scores(
        frechet(first),
        kid,
        mind,
        second,
        corrected,
        means,
        share,
        preference,
        target,
        outside,
        disagreement,
        control,
    )


def controlled(generated: Features, network: str, device: str = "cpu") -> Controlled:
    """Return what was drawn for control images, for the control score by a network."""
    apart = torch.from_numpy(generated[DISAGREEMENT][:, 0])
    return Controlled(torch.from_numpy(generated[network]).to(device), apart)


def num_black(features: torch.Tensor, network: FeatureNetwork) -> int:
    """Return how many pictures are black, as those whose pixels were not numbers have become.

    Args:
        features: of the pictures by the network, float32, N x D, on the CPU.
    """
    black = network.features(torch.zeros(1, 3, BLACK_SIDE, BLACK_SIDE, dtype=torch.uint8))
    apart, size = (features - black).norm(dim=1), features.norm(dim=1).mean()
    return int((apart <= ALIKE * size).sum())


def difference_by(
    measure: str, one: torch.Tensor, other: torch.Tensor, real: Real, network: str, *, resamples: int
) -> PairedDifference:
    """Compare two candidates on common captions and noise by a score that can rank.

    Args:
        measure: one of `records.MEASURES`, but not the subject score (`SubjectReference.difference`), the
            control score (`control_difference_by`) or votes.
        one, other: features from the ranking network, whose identity is `network`: float, N x D each; for the
            preference gap rewards by the reward model `network`: float, N x 1.
        resamples: as `evaluate.bootstrap`.
    """
    if measure == PREFERENCE:
        return preference_difference(one[:, 0], other[:, 0], network)
    moments, references = real.moments[network], torch.from_numpy(real.features[network]).to(one.device)
    if measure == TARGET:
        return target_difference(one, other, references, network)
    if measure == KID:
        return kernel_difference(one, other, references, network)
    if measure == MIND:
        return mind_difference(one, other, references, network)
    if measure == CORRECTED:
        assert real.correction is not None
        return corrected_difference(one, other, moments, real.correction, num_resamples=resamples)
    assert measure == FID
    return paired_difference(one, other, moments, num_resamples=resamples)


def control_difference_by(
    one: Features, other: Features, real: Real, network: str, *, resamples: int, device: str = "cpu"
) -> PairedDifference:
    """Compare two candidates on common control images and noise by the control score.

    Args:
        one, other: features with `DISAGREEMENT`.
    """
    assert real.scale
    first, second = (controlled(each, network, device) for each in (one, other))
    correction = real.correction_for(len(first.apart))
    return control_difference(
        first, second, real.moments[network], correction, real.scale, num_resamples=resamples
    )


@dataclass(frozen=True)
class Copies:
    """Near copies of training pictures among generated pictures.

    Attributes:
        nearest: number of the nearest training picture and the nearness to it (`CopyDetector.nearness`), for
            each generated picture.
        share: share of near copies; None if the detector has no threshold.
        facts: of the detector.
    """

    nearest: list[tuple[int, float]]
    share: float | None
    facts: DetectorFacts

    def record(self, metric: str = COPIES) -> Measurement | None:
        """Record of the share; None if it is not known."""
        if self.share is None:
            return None
        error = share_error(self.share, len(self.nearest))
        told = {"metric": metric, "value": self.share, "standard_error": error}
        return Measurement.model_validate(told | {"num_samples": len(self.nearest)} | asdict(self.facts))


@dataclass(frozen=True)
class Recited:
    """What is drawn for captions of training pictures, where memorisation shows most.

    Attributes:
        own: share whose nearest training picture has the caption that they were drawn for.
        chance: the same share of training pictures chosen at random.
    """

    copies: Copies
    own: float
    chance: float

    def records(self) -> list[Measurement]:
        """Records of near copies, if known, and of the caption's own picture, if captions differ."""
        found, count = self.copies.record(RECITED), len(self.copies.nearest)
        records = [found] if found else []
        if self.tells_own:
            told = {"metric": OWN, "value": self.own, "standard_error": share_error(self.own, count)}
            told |= {"num_samples": count, "feature_network": self.copies.facts.feature_network}
            told |= {"num_training": self.copies.facts.num_training, "expected_share": self.chance}
            records.append(Measurement.model_validate(told))
        return records

    @property
    def tells_own(self) -> bool:
        """Return whether captions differ enough for their own pictures to say anything."""
        return self.chance < 0.5


@dataclass(frozen=True)
class SetScores:
    """Complete measures of one set of pictures.

    Attributes:
        further: records beyond the ranking scores.
        left_out: measures that were not computed and the reasons, as sentences.
        copies: near copies; None if `evaluate.memorisation_pictures` is 0.
        recited: the same of pictures for training captions.
    """

    scores: Scores
    further: list[Measurement]
    left_out: list[str]
    copies: Copies | None
    recited: Recited | None = None

    def records(self) -> list[Measurement]:
        """Further records, plus those of near copies that are known."""
        found = self.copies.record() if self.copies else None
        recited = self.recited.records() if self.recited else []
        return [*self.further, *([found] if found else []), *recited]


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
    stand_in = next((each for each in networks.ranking if isinstance(each, EfficientNet)), None)
    if networks.classes is None and stand_in is None:
        left_out.append(
            "No Inception Score: it needs evaluate.inception_classes, or evaluate.second_network of kind "
            "efficientnet-lite0."
        )
    elif len(pictures) < 2 * PARTS:
        left_out.append(f"No Inception Score: it needs {2 * PARTS} pictures.")
    elif networks.classes:
        classes = networks.classes.probabilities(pictures)
        found.append(measurement(inception_score(classes, networks.classes.identity, splits=PARTS)))
    elif stand_in:
        classes = stand_in.classes(torch.from_numpy(generated[stand_in.identity]))
        found.append(measurement(inception_score(classes, stand_in.identity, splits=PARTS)))
    for model in real.rewards.keys() & generated.keys():
        found.append(measurement(mean_reward(torch.from_numpy(generated[model][:, 0]), model)))
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


def near_copies(pictures: np.ndarray, detector: CopyDetector, facts: DetectorFacts) -> Copies:
    """Find the nearest training picture of each generated one, and the share of near copies.

    Args:
        pictures: features by the detector's network: float, N x D.
    """
    nearness, indices = detector.nearness(torch.from_numpy(pictures))
    pairs = list(zip(indices.tolist(), nearness.tolist(), strict=True))
    return Copies(pairs, detector.share(nearness), facts)


def recited(
    pictures: np.ndarray, captions: list[str], detector: CopyDetector, facts: DetectorFacts
) -> Recited:
    """Compare pictures that were drawn for captions of training pictures with these.

    Args:
        pictures: as in `near_copies`; picture i was drawn for caption i.
        captions: of the detector's training pictures.
    """
    found, uses = near_copies(pictures, detector, facts), Counter(captions)
    drawn = captions[: len(pictures)]
    own = [captions[index] == caption for caption, (index, _) in zip(drawn, found.nearest, strict=True)]
    return Recited(found, fmean(own), fmean(uses[caption] / len(captions) for caption in drawn))


def describe_record(record: Measurement) -> str:
    """Format a measurement for display."""
    value = number(record.value, 4, record.standard_error)
    return f"{record.metric} {value} ({record.num_samples} pictures, {record.feature_network})"
