"""How well a model draws one subject of few photos. Pure PyTorch, in float64.

Fréchet and kernel distances need many real pictures, and a model that has learned its few photos by heart is
the nearest to them. So a subject is judged by what can go wrong, in features in which pictures of the same
thing are alike (DINO, CLIP). Each of the parts below is a share of the way from the best value to the worst,
and the score is their sum: 0 at best, 1 or more for the base model and for one that draws its training
photos again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from ray_jobs.metrics.copies import NEIGHBOURS, relative
from ray_jobs.metrics.resampling import PairedDifference
from ray_jobs.metrics.score import Score

UNLIKE, BY_HEART, CLASS_LOST, VARIETY_LOST, FIT_LOST = PARTS = (
    "unlike",
    "by_heart",
    "class_lost",
    "variety_lost",
    "fit_lost",
)
"""Parts of the score, in the order in which they are shown.

unlike: how far the pictures are from the likeness of the photos among themselves; the base is at 1. Likeness
is the mean cosine to photos that were not trained on. More likeness than that of photos counts as theirs.

by_heart: how much nearer the pictures come to one photo trained on, for the distance of the next ones
(`copies.relative`), than other photos of the subject do. 0 where they come no nearer, 1 for copies.

class_lost: squared kernel distance (linear, unbiased) of the pictures of the class prompt from the base's. At
1 the class has become as different as the subject's photos are.

variety_lost: how much more alike the pictures are to each other than the photos are.

fit_lost: how much of the agreement of own prompts with their pictures is lost, by CLIP. The base is at 0, and
pictures of other prompts are at 1.
"""

METRIC = "subject score"
SMALLEST = 1e-3  # difference of cosines below which a share of it says nothing
FEWEST = 4  # pictures, of which halves still tell how alike they are


class Drawn(NamedTuple):
    """Features of what a model draws for one subject.

    Attributes:
        own: pictures of the instance prompt: float, N x D.
        of_class: of the class prompt: float, M x D; None without one.
    """

    own: torch.Tensor
    of_class: torch.Tensor | None = None


class Photos(NamedTuple):
    """Features of a subject's photos as the base's autoencoder restores them.

    Attributes:
        unseen: not trained on: float, at least 1 x D.
        seen: trained on: float, K x D; empty if nothing was held out, and `unseen` are all.
    """

    unseen: torch.Tensor
    seen: torch.Tensor


@dataclass(frozen=True, eq=False)
class DrawnSubjects:
    """All pictures that a model draws for its subjects, as features.

    Attributes:
        subjects: one per subject.
        prompted: pictures of own prompts by CLIP: float, P x D; None without CLIP or prompts.
    """

    subjects: Sequence[Drawn]
    prompted: torch.Tensor | None = None

    @property
    def num_samples(self) -> int:
        """Number of pictures of the instance prompts."""
        return sum(len(each.own) for each in self.subjects)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the features as float32 tensors, which `read` takes."""
        found = {}
        for number, drawn in enumerate(self.subjects):
            found[f"{number}.own"] = drawn.own.float()
            if drawn.of_class is not None:
                found[f"{number}.class"] = drawn.of_class.float()
        if self.prompted is not None:
            found["prompted"] = self.prompted.float()
        return found

    @classmethod
    def read(cls, tensors: Mapping[str, torch.Tensor]) -> "DrawnSubjects":
        """Inverse of `tensors`."""
        subjects = []
        for number in count():
            if (own := tensors.get(f"{number}.own")) is None:
                break
            subjects.append(Drawn(own, tensors.get(f"{number}.class")))
        return cls(subjects, tensors.get("prompted"))


class SubjectScore(NamedTuple):
    """The score and its parts, by name; parts that cannot be told are left out."""

    total: Score
    parts: dict[str, Score]


@dataclass(frozen=True, eq=False)
class SubjectReference:
    """What the pictures of a model are compared with.

    Attributes:
        photos: one per subject.
        base: what the base model draws, with the same noise.
        texts: own prompts by CLIP: float, P x D; None without CLIP or prompts.
    """

    photos: Sequence[Photos]
    base: DrawnSubjects
    feature_network: str
    texts: torch.Tensor | None = None

    def score(self, drawn: DrawnSubjects, *, num_resamples: int, seed: int = 0) -> SubjectScore:
        """Score what a model draws.

        Errors are the deviations of scores of random halves of the pictures from that of all, as in
        `resampling`; they do not cover the choice of the photos.

        Args:
            num_resamples: number of random halves; 0: no errors.
        """
        judge = _Judge(self, drawn)
        values = judge.parts(judge.everything)
        halves = [judge.parts(half) for half in judge.halves(num_resamples, seed)]

        def scored(value: float, of_halves: list[float]) -> Score:
            return Score(value, drawn.num_samples, self.feature_network, _error(value, of_halves), METRIC)

        parts = {name: scored(value, [half[name] for half in halves]) for name, value in values.items()}
        return SubjectScore(scored(sum(values.values()), [sum(half.values()) for half in halves]), parts)

    def difference(
        self, one: DrawnSubjects, other: DrawnSubjects, *, num_resamples: int, seed: int = 0
    ) -> PairedDifference:
        """Compare two models whose pictures have the same noise; each half takes the same pictures of both.

        Raises:
            ValueError: they drew different numbers of pictures, or `num_resamples` is below 2.
        """
        first, second = _Judge(self, one), _Judge(self, other)
        if first.sizes != second.sizes or num_resamples < 2:
            raise ValueError(
                f"subject score: needs as many pictures of both and 2 halves; got {first.sizes},"
                f" {second.sizes} and {num_resamples}"
            )
        whole = [sum(judge.parts(judge.everything).values()) for judge in (first, second)]
        halves = [
            [sum(judge.parts(half).values()) for half in judge.halves(num_resamples, seed)]
            for judge in (first, second)
        ]
        value = whole[0] - whole[1]
        apart = [mine - its for mine, its in zip(*halves, strict=True)]
        error = _error(value, apart) or 0.0
        separate = sum((_error(all_, parts) or 0.0) ** 2 for all_, parts in zip(whole, halves, strict=True))
        ratio = separate / error**2 if error else float("inf")
        return PairedDifference(value, error, ratio, one.num_samples, self.feature_network)


def _error(value: float, of_halves: Sequence[float]) -> float | None:
    """Root mean square deviation of halves; as large as the standard error of the whole."""
    if not of_halves:
        return None
    return (sum((each - value) ** 2 for each in of_halves) / len(of_halves)) ** 0.5


Chosen = list[tuple[torch.Tensor, torch.Tensor | None]]
"""Picture numbers, of a subject's own pictures and of its class's, one pair per subject."""


class _Judge:
    """Computes the parts of any choice of the pictures, from cosines that are computed once."""

    def __init__(self, reference: SubjectReference, drawn: DrawnSubjects) -> None:
        self.subjects = [
            _Subject(photos, base, its)
            for photos, base, its in zip(
                reference.photos, reference.base.subjects, drawn.subjects, strict=True
            )
        ]
        self.fit: tuple[torch.Tensor, torch.Tensor, float] | None = None
        texts, before = reference.texts, reference.base.prompted
        if texts is not None and before is not None and drawn.prompted is not None and len(texts) > 1:
            by_chance = _unit(before) @ _unit(texts).T
            own = by_chance.diagonal()
            room = float(own.mean()) - _apart(by_chance)
            if room > SMALLEST:
                self.fit = own, (_unit(drawn.prompted) * _unit(texts)).sum(dim=1), room
        self.sizes = [(len(each.likeness), each.num_class) for each in self.subjects]
        self.num_prompts = 0 if self.fit is None else len(self.fit[0])

    @property
    def everything(self) -> tuple[Chosen, torch.Tensor]:
        chosen: Chosen = [
            (torch.arange(own), torch.arange(kind) if kind else None) for own, kind in self.sizes
        ]
        return chosen, torch.arange(self.num_prompts)

    def halves(self, number: int, seed: int) -> list[tuple[Chosen, torch.Tensor]]:
        """Draw halves; none if a set is too small to be halved."""
        if any(0 < size < FEWEST for sizes in self.sizes for size in sizes):
            return []
        generator = torch.Generator().manual_seed(seed)

        def half(size: int) -> torch.Tensor:
            return torch.randperm(size, generator=generator)[: (size + 1) // 2]

        return [
            ([(half(own), half(kind) if kind else None) for own, kind in self.sizes], half(self.num_prompts))
            for _ in range(number)
        ]

    def parts(self, chosen: tuple[Chosen, torch.Tensor]) -> dict[str, float]:
        """Compute the parts of chosen pictures: of each part the mean of the subjects that have it."""
        of_subjects, of_prompts = chosen
        found: dict[str, list[float]] = {}
        for subject, (own, kind) in zip(self.subjects, of_subjects, strict=True):
            for name, value in subject.parts(own, kind).items():
                found.setdefault(name, []).append(value)
        parts = {name: sum(found[name]) / len(found[name]) for name in PARTS if name in found}
        if self.fit is not None:
            before, after, room = self.fit
            lost = float((before[of_prompts] - after[of_prompts]).mean()) / room
            parts[FIT_LOST] = max(0.0, lost)
        return parts


class _Subject:
    """The cosines of one subject. A part whose range is below `SMALLEST` is left out."""

    def __init__(self, photos: Photos, base: Drawn, drawn: Drawn) -> None:
        unseen, seen, own, before = map(_unit, (photos.unseen, photos.seen, drawn.own, base.own))
        everyone = torch.cat([unseen, seen])
        self.likeness = (own @ unseen.T).mean(dim=1)
        self.best = float((seen @ unseen.T).mean()) if len(seen) else _apart(unseen @ unseen.T)
        self.room = self.best - float((before @ unseen.T).mean())
        trained_on = seen if len(seen) else unseen
        self.nearness, self.of_photos = _nearness(own, trained_on), 0.0
        if len(trained_on) > 2:
            others = [_nearness(trained_on, trained_on, themselves=True)]
            others += [_nearness(unseen, trained_on)] if len(seen) else []
            self.of_photos = float(torch.cat(others).mean())
        self.among = own @ own.T
        self.photos_vary = 1 - _apart(everyone @ everyone.T)
        self.num_class, self.class_range = 0, 0.0
        if drawn.of_class is not None and base.of_class is not None:
            kind, kind_before = _unit(drawn.of_class), _unit(base.of_class)
            self.num_class = len(kind)
            self.kinds, self.crossed = kind @ kind.T, kind @ kind_before.T
            self.before = _apart(kind_before @ kind_before.T)
            to_photos = float((kind_before @ everyone.T).mean())
            self.class_range = self.before + _apart(everyone @ everyone.T) - 2 * to_photos

    def parts(self, own: torch.Tensor, kind: torch.Tensor | None) -> dict[str, float]:
        found = {}
        if self.room > SMALLEST:
            found[UNLIKE] = max(0.0, (self.best - float(self.likeness[own].mean())) / self.room)
        if self.of_photos > SMALLEST:
            found[BY_HEART] = max(0.0, 1 - float(self.nearness[own].mean()) / self.of_photos)
        if kind is not None and self.class_range > SMALLEST:
            # Pictures of the same noise are no independent pair.
            others = self.crossed[kind].sum() - self.crossed[kind, kind].sum()
            cross = float(others) / (len(kind) * (self.crossed.shape[1] - 1))
            after = _apart(self.kinds[kind][:, kind])
            found[CLASS_LOST] = (after + self.before - 2 * cross) / self.class_range
        if self.photos_vary > SMALLEST and len(own) > 1:
            variety = 1 - _apart(self.among[own][:, own])
            found[VARIETY_LOST] = max(0.0, 1 - variety / self.photos_vary)
        return found


def _unit(features: torch.Tensor) -> torch.Tensor:
    return normalize(features.detach().cpu().double(), dim=1)


def _apart(cosines: torch.Tensor) -> float:
    """Mean of a square matrix without its diagonal; 1 for a single picture."""
    size = len(cosines)
    if size < 2:
        return 1.0
    return float((cosines.sum() - cosines.diagonal().sum()) / (size * (size - 1)))


def _nearness(pictures: torch.Tensor, photos: torch.Tensor, themselves: bool = False) -> torch.Tensor:
    """Distance of each picture to the nearest photo, divided by the mean distance to the next: float64, N.

    Args:
        themselves: the pictures are the photos, and each is compared with the others.
    """
    distances = (2 - 2 * pictures @ photos.T).clamp_min(0).sqrt().sort(dim=1).values
    return relative(distances[:, int(themselves) :][:, : NEIGHBOURS + 1])
