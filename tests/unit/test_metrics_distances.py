"""Metrics of feature vectors, by hand on small sets, and against a rival."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from ray_jobs.metrics.frechet import Moments, frechet_distance
from ray_jobs.metrics.inception_score import inception_score
from ray_jobs.metrics.kernel import kernel_difference, kernel_distance, squared_mmd
from ray_jobs.metrics.neighbours import nearest, precision_recall, share_error
from ray_jobs.metrics.similarity import class_drift, clip_score, image_similarity
from tests.unit.test_metrics import GivenFeatures


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def points(*values: float) -> torch.Tensor:
    """One feature a picture."""
    return torch.tensor(values)[:, None]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    cuts=st.lists(st.integers(1, 119), max_size=8, unique=True),
    order=st.randoms(use_true_random=False),
    grouped=st.booleans(),
    offset=st.sampled_from([0.0, 1e3]),
)
def test_moments_are_the_same_for_any_split_in_any_order(
    cuts: list[int], order: random.Random, grouped: bool, offset: float
) -> None:
    features = normal(120, 12, seed=1) + offset
    whole, other = Moments.of(features), Moments.of(normal(60, 12, seed=2) + offset + 0.5)
    edges = [0, *sorted(cuts), 120]
    parts = [Moments.of(features[a:b]) for a, b in itertools.pairwise(edges)]
    order.shuffle(parts)
    while len(parts) > 1:
        # From the left, or pairs of neighbours, as a tree of actors would.
        at = len(parts) // 2 - 1 if grouped else 0
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    merged = parts[0]
    assert merged.count == 120
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-6, atol=1e-9)
    assert frechet_distance(merged, other) == pytest.approx(frechet_distance(whole, other), rel=1e-6)


def test_the_mmd_of_one_feature_equals_the_formula_by_hand() -> None:
    # Kernel (xy + 1)^3. Within {0, 1}: k = 1. Within {1, 2}: k = 27. Across: 1, 1, 8, 27, mean 9.25.
    assert squared_mmd(points(0, 1), points(1, 2)) == pytest.approx(1 + 27 - 2 * 9.25)


def test_kid_equals_torchmetrics_on_the_same_subsets() -> None:
    real, fake = normal(60, 32, seed=1).relu(), normal(50, 32, seed=2).relu() + 0.1
    rival = KernelInceptionDistance(GivenFeatures(32), subsets=20, subset_size=25, normalize=True)
    rival.update(real, real=True)
    rival.update(fake, real=False)
    torch.manual_seed(7)  # it draws from the global generator, the real pictures first
    mean, deviation = rival.compute()
    ours = kernel_distance(fake, real, "network", num_subsets=20, subset_size=25, seed=7)
    assert ours.value == pytest.approx(float(mean), rel=1e-4)
    # Subsets of half the pictures: the error is their deviation, torchmetrics' with 20 instead of 19.
    assert ours.standard_error == pytest.approx(float(deviation) * (20 / 19) ** 0.5, rel=1e-4)
    assert (ours.metric, ours.num_samples, ours.feature_network) == ("KID", 50, "network")


def test_kid_of_one_distribution_is_zero_within_its_error_and_unbiased() -> None:
    scores = [kernel_distance(normal(60, 16, seed=s), normal(60, 16, seed=s + 99), "n") for s in range(40)]
    values = torch.tensor([score.value for score in scores])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 40**0.5
    assert sum(abs(s.value) < 2 * (s.standard_error or 0) for s in scores) >= 36


def test_the_error_of_kid_is_the_spread_of_other_pictures() -> None:
    scores = [
        kernel_distance(
            normal(120, 8, seed=s) + 0.5, normal(120, 8, seed=s + 99), "n", num_subsets=50, subset_size=20
        )
        for s in range(60)
    ]
    spread = float(torch.tensor([score.value for score in scores]).std())
    assert sum(score.standard_error or 0 for score in scores) / 60 == pytest.approx(spread, rel=0.3)


def test_kid_of_pairs_on_common_noise_differs_by_less_than_of_others() -> None:
    found = []
    for seed in range(40):
        real, noise = normal(80, 8, seed=seed + 99), normal(60, 8, seed=seed) + 0.3
        pair = noise, 1.1 * noise
        found.append(kernel_difference(*pair, real, "n", num_subsets=40))
        values = [kernel_distance(each, real, "n", num_subsets=40).value for each in pair]
        assert found[-1].value == pytest.approx(values[0] - values[1])
        assert (found[-1].num_samples, found[-1].feature_network) == (60, "n")
    spread = float(torch.tensor([each.value for each in found]).std())
    assert 0.7 < sum(each.standard_error for each in found) / 40 / spread < 1.5
    assert all(each.variance_ratio > 4 for each in found)
    same = kernel_difference(noise, noise, real, "n")
    assert (same.value, same.standard_error) == (0, 0)
    with pytest.raises(ValueError, match="pairs need as many pictures"):
        kernel_difference(noise, noise[:50], real, "n")


@pytest.mark.parametrize("subset_size", [1, 10])
def test_kid_needs_subsets_smaller_than_the_sets(subset_size: int) -> None:
    with pytest.raises(ValueError, match=rf"KID: needs .*100 of {subset_size} of 10"):
        kernel_distance(normal(10, 4, seed=0), normal(12, 4, seed=1), "n", subset_size=subset_size)


def test_the_inception_score_of_sure_and_even_classes_is_their_number_and_of_equal_pictures_one() -> None:
    sure = torch.eye(4).repeat(5, 1)
    assert inception_score(sure, "classifier", splits=1).value == pytest.approx(4)
    assert inception_score(torch.full((8, 4), 0.25), "classifier", splits=2).value == pytest.approx(1)


def test_the_inception_score_equals_torchmetrics_where_there_is_one_part() -> None:
    logits = 2 * normal(64, 10, seed=1)
    rival = InceptionScore(GivenFeatures(10), splits=1)
    rival.update(logits)
    assert inception_score(logits.softmax(dim=1), "c", splits=1).value == pytest.approx(
        float(rival.compute()[0]), rel=1e-5
    )


def test_the_inception_score_is_the_mean_over_parts_with_their_error() -> None:
    probabilities = (2 * normal(60, 5, seed=2)).softmax(dim=1)
    parts = torch.tensor([inception_score(probabilities[i::4], "c", splits=1).value for i in range(4)])
    score = inception_score(probabilities, "classifier@sha256:0", splits=4)
    assert score.value == pytest.approx(float(parts.mean()))
    assert score.standard_error == pytest.approx(float(parts.std() / 2))
    assert (score.metric, score.num_samples, score.feature_network) == ("IS", 60, "classifier@sha256:0")


def test_logits_and_too_many_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="after the softmax"):
        inception_score(normal(20, 5, seed=1), "c")
    with pytest.raises(ValueError, match="splits: from 1 to .* 3; not 10"):
        inception_score(torch.full((3, 2), 0.5), "c")


def test_the_nearest_are_found_in_any_chunks() -> None:
    queries, references = points(0.2, 5.5, 9), points(4, 0, 10)
    for limit in (3, 6, 100):
        distances, indices = nearest(queries, references, k=2, limit=limit)
        assert indices.tolist() == [[1, 0], [0, 2], [2, 0]]
        torch.testing.assert_close(distances.float(), torch.tensor([[0.2, 3.8], [1.5, 4.5], [1, 5]]))


def test_precision_and_recall_are_those_worked_out_by_hand() -> None:
    # Balls of the real points 0, 1, 3 with k = 1: radii 1, 1, 2, together -1 to 5.
    # Of the generated -0.5, 6, 7, 5.1: radii 5.6, 0.9, 1, 0.9; together -6.1 to 5.1 and up to 8.
    real, generated = points(0, 1, 3), points(-0.5, 6, 7, 5.1)
    found = precision_recall(generated, real, "network", k=1)
    assert found.precision == pytest.approx(1 / 4)
    assert found.recall == 1
    swapped = precision_recall(real, generated, "network", k=1, limit=4)
    assert (swapped.precision, swapped.recall) == (found.recall, found.precision)
    assert (found.num_samples, found.num_real, found.k, found.feature_network) == (4, 3, 1, "network")


def test_good_pictures_of_one_mode_have_precision_and_no_recall() -> None:
    modes = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    real = torch.cat([normal(60, 2, seed=1) + modes[0], normal(60, 2, seed=2) + modes[1]])
    found = precision_recall(0.5 * normal(80, 2, seed=3) + modes[0], real, "network")
    assert found.precision > 0.95
    assert found.recall <= 0.5
    with pytest.raises(ValueError, match="k: from 1 to one less"):
        precision_recall(real, real[:3], "network", k=3)


def test_a_share_has_the_spread_of_shares_that_are_drawn_anew() -> None:
    drawn = np.random.default_rng(0).binomial(100, 0.3, size=20_000) / 100
    assert share_error(0.3, 100) == pytest.approx(drawn.std(), rel=0.03)
    assert share_error(0, 10) == pytest.approx(share_error(1, 10))
    assert share_error(0, 10) > 0.05, "none of few is not certain"


def test_the_clip_score_equals_the_formula_by_hand() -> None:
    pictures = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    captions = torch.tensor([[1.0, 1.0], [0.0, 5.0], [-1.0, 0.0]])
    score = clip_score(pictures, captions, "clip")
    each = [2.5 * 0.5**0.5, 2.5, 0.0]
    assert score.value == pytest.approx(sum(each) / 3)
    spread = math.sqrt(sum((x - sum(each) / 3) ** 2 for x in each) / 2)
    assert score.standard_error == pytest.approx(spread / 3**0.5)
    with pytest.raises(ValueError, match="captions: one a picture; got 2 for 3"):
        clip_score(pictures, captions[:2], "clip")


def test_the_likeness_to_a_subject_is_the_mean_over_all_pairs() -> None:
    pictures, photos = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    score = image_similarity(pictures, photos, "dino")
    assert score.value == pytest.approx((1 + 0.5**0.5 + 0 + 0.5**0.5) / 4)
    assert (score.num_samples, score.feature_network) == (2, "dino")


def test_a_class_that_becomes_its_subject_has_drifted_toward_it() -> None:
    photos = torch.tensor([[1.0, 0.0, 0.0]])
    before = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    toward = class_drift(before, before + torch.tensor([1.0, 0.0, 0.0]), photos, "dino")
    assert toward.distance.value == pytest.approx(1 - 0.5**0.5)
    assert toward.toward_subject.value == pytest.approx(0.5**0.5)
    elsewhere = class_drift(before, before.flip(0), photos, "dino")
    assert elsewhere.distance.value == pytest.approx(1)
    assert elsewhere.toward_subject.value == pytest.approx(0, abs=1e-12)
    still = class_drift(before, before, photos, "dino")
    assert (still.distance.value, still.toward_subject.value) == (pytest.approx(0, abs=1e-12), 0)
