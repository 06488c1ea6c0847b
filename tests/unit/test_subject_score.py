"""The score of a subject run: what each part sees, and that learning by heart loses."""

from collections.abc import Callable

import pytest
import torch

from ray_jobs.metrics.subject import (
    BY_HEART,
    CLASS_LOST,
    FIT_LOST,
    PARTS,
    UNLIKE,
    VARIETY_LOST,
    Drawn,
    DrawnSubjects,
    Photos,
    SubjectReference,
    SubjectScore,
)
from ray_jobs.run.records import SUBJECT_PARTS, RungRow

DIM, NUM = 64, 16
RESAMPLES = 200


class World:
    """A subject among others of its class, as directions in a space of features.

    A picture is its class's direction, plus the subject's where it shows the subject, plus its own.
    """

    def __init__(self, seed: int = 0, num_seen: int = 6, num_unseen: int = 2) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.of_class, self.of_subject = (
            torch.nn.functional.normalize(each, dim=0) for each in self.noise(2)
        )
        self.photos = Photos(self.pictures(1.0, num_unseen), self.pictures(1.0, num_seen))
        self.base = DrawnSubjects([Drawn(self.pictures(0.0), self.pictures(0.0))])

    def noise(self, num: int) -> torch.Tensor:
        return torch.randn(num, DIM, generator=self.generator, dtype=torch.float64)

    def pictures(self, subject: float, num: int = NUM, own: float = 1.0) -> torch.Tensor:
        shown = self.of_class + 1.5 * subject * self.of_subject
        return shown + own * torch.nn.functional.normalize(self.noise(num), dim=1)

    @property
    def reference(self) -> SubjectReference:
        return SubjectReference([self.photos], self.base, "a network")

    def copies(self, noise: float = 0.1) -> torch.Tensor:
        """Pictures that repeat the photos trained on."""
        seen = self.photos.seen
        return seen[torch.arange(NUM) % len(seen)] + noise * torch.nn.functional.normalize(
            self.noise(NUM), dim=1
        )

    def score(
        self, own: torch.Tensor, of_class: torch.Tensor | None = None, errors: bool = True
    ) -> SubjectScore:
        drawn = DrawnSubjects([Drawn(own, self.pictures(0.0) if of_class is None else of_class)])
        return self.reference.score(drawn, num_resamples=RESAMPLES if errors else 0)


def mean_parts(draw: Callable[[World], tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Means of the parts and of the total over many worlds."""
    scores = []
    for seed in range(30):
        world = World(seed)
        scores.append(world.score(*draw(world), errors=False))
    found = {part: sum(each.parts[part].value for each in scores) / len(scores) for part in PARTS[:4]}
    return found | {"total": sum(each.total.value for each in scores) / len(scores)}


def test_a_model_that_draws_the_subject_anew_has_nearly_nothing_against_it() -> None:
    found = mean_parts(lambda world: (world.pictures(1.0), world.pictures(0.0)))
    assert found == pytest.approx(dict.fromkeys([*PARTS[:4], "total"], 0.0), abs=0.12)


def test_the_base_is_at_one() -> None:
    world = World()
    [drawn] = world.base.subjects
    found = world.score(drawn.own, drawn.of_class)
    assert found.parts[UNLIKE].value == pytest.approx(1)
    assert found.total.value == pytest.approx(1, abs=0.3)
    assert mean_parts(lambda world: (world.pictures(0.0), world.pictures(0.0)))["total"] == pytest.approx(
        1, abs=0.1
    )


def test_copies_of_the_photos_trained_on_lose_to_a_model_that_is_half_way() -> None:
    copies = mean_parts(lambda world: (world.copies(), world.pictures(0.0)))
    half_way = mean_parts(lambda world: (world.pictures(0.5), world.pictures(0.0)))
    assert copies[BY_HEART] == pytest.approx(0.92, abs=0.03)  # they are not exact
    assert copies[UNLIKE] == pytest.approx(0, abs=0.1)  # by likeness alone they would win
    assert half_way[UNLIKE] > 0.2
    assert half_way["total"] < copies["total"] - 0.3


def test_learning_by_heart_shows_also_where_no_photo_is_held_out() -> None:
    world = World()
    everyone = Photos(torch.cat(list(world.photos)), world.photos.seen[:0])
    reference = SubjectReference([everyone], world.base, "a network")
    learned, drawn_anew = (
        reference.score(DrawnSubjects([Drawn(own)]), num_resamples=0).parts[BY_HEART].value
        for own in (world.copies(), world.pictures(1.0))
    )
    assert learned > 0.8
    assert drawn_anew < 0.1


def test_a_class_that_has_become_the_subject_is_lost() -> None:
    found = mean_parts(lambda world: (world.pictures(1.0), world.pictures(1.0)))
    assert found[CLASS_LOST] == pytest.approx(1, abs=0.1)
    drifted = mean_parts(lambda world: (world.pictures(1.0), world.pictures(0.5)))
    assert 0.1 < drifted[CLASS_LOST] < 0.6


def test_the_same_picture_again_and_again_has_lost_all_variety() -> None:
    found = mean_parts(lambda world: (world.pictures(1.0, 1).expand(NUM, -1), world.pictures(0.0)))
    assert found[VARIETY_LOST] == pytest.approx(1, abs=1e-6)
    more = mean_parts(lambda world: (world.pictures(1.0, own=2.0), world.pictures(0.0)))
    assert more[VARIETY_LOST] == 0  # more variety than the photos have is not held against likeness twice


def test_fit_is_lost_as_far_as_pictures_no_longer_show_what_was_asked_for() -> None:
    world = World()
    texts = world.noise(8)
    base = DrawnSubjects(world.base.subjects, prompted=texts + world.noise(8))
    reference = SubjectReference([world.photos], base, "a network", texts)

    def lost(pictures: torch.Tensor) -> float:
        drawn = DrawnSubjects(world.base.subjects, prompted=pictures)
        return reference.score(drawn, num_resamples=0).parts[FIT_LOST].value

    assert base.prompted is not None
    assert lost(base.prompted) == pytest.approx(0)
    assert lost(texts) == 0  # better than the base's is no merit of a subject
    assert lost(base.prompted.roll(1, 0)) == pytest.approx(1, abs=0.35)
    assert FIT_LOST not in world.score(world.pictures(1.0)).parts


def test_errors_are_as_large_as_the_scatter_over_other_noise() -> None:
    world = World(3)
    found = [world.score(world.pictures(0.6)) for _ in range(40)]
    values = torch.tensor([each.total.value for each in found])
    errors = [each.total.standard_error for each in found]
    assert all(errors)
    mean_error = sum(error or 0.0 for error in errors) / len(errors)
    assert mean_error == pytest.approx(float(values.std()), rel=0.35)
    for part in PARTS[:4]:
        assert all(each.parts[part].standard_error is not None for each in found)


def test_common_noise_makes_a_difference_surer() -> None:
    world = World()
    own, kind = world.pictures(0.6), world.pictures(0.0)
    moved = own - 0.3 * world.of_subject
    one, other = (DrawnSubjects([Drawn(each, kind)]) for each in (own, moved))
    found = world.reference.difference(one, other, num_resamples=RESAMPLES)
    scores = [world.reference.score(each, num_resamples=RESAMPLES).total.value for each in (one, other)]
    assert found.value == pytest.approx(scores[0] - scores[1])
    assert found.value < -2 * found.standard_error < 0
    assert found.variance_ratio > 3
    fewer = DrawnSubjects([Drawn(own[:8], kind)])
    with pytest.raises(ValueError, match="as many pictures of both"):
        world.reference.difference(one, fewer, num_resamples=RESAMPLES)


def test_several_subjects_count_alike() -> None:
    first, second = World(1), World(2)
    drawn = [
        Drawn(world.pictures(share), world.pictures(0.0)) for world, share in ((first, 0.2), (second, 0.9))
    ]
    alone = [
        world.reference.score(DrawnSubjects([each]), num_resamples=0)
        for world, each in zip((first, second), drawn, strict=True)
    ]
    base = DrawnSubjects([*first.base.subjects, *second.base.subjects])
    both = SubjectReference([first.photos, second.photos], base, "a network")
    found = both.score(DrawnSubjects(drawn), num_resamples=0)
    assert found.total.value == pytest.approx(sum(each.total.value for each in alone) / 2)
    assert found.total.num_samples == 2 * NUM


def test_photos_that_are_all_alike_tell_nothing_that_depends_on_their_differences() -> None:
    world = World()
    photo = world.photos.seen[:1]
    reference = SubjectReference([Photos(photo.expand(2, -1), photo.expand(6, -1))], world.base, "a network")
    found = reference.score(DrawnSubjects([Drawn(world.pictures(1.0))]), num_resamples=0)
    assert set(found.parts) == {UNLIKE}


def test_records_name_the_parts_of_the_score() -> None:
    assert tuple(SUBJECT_PARTS) == PARTS
    errors = {f"{part}_error" for part in PARTS}
    assert RungRow.model_fields.keys() >= {*PARTS, *errors}


def test_what_was_drawn_can_be_kept_as_tensors() -> None:
    drawn = DrawnSubjects(
        [Drawn(torch.ones(2, 3), torch.zeros(2, 3)), Drawn(torch.ones(1, 3))], torch.ones(4, 5)
    )
    read = DrawnSubjects.read(drawn.tensors())
    assert [each.of_class is None for each in read.subjects] == [False, True]
    assert read.prompted is not None
    assert read.prompted.shape == (4, 5)
