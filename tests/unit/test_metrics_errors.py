"""Errors of the Fréchet distance: against closed forms, and against drawing the pictures again."""

import math
from collections.abc import Sequence

import pytest
import torch
from scipy.stats import linregress

from ray_jobs.metrics.extrapolation import NUM_POINTS, fid_infinity
from ray_jobs.metrics.frechet import Moments, frechet_distance
from ray_jobs.metrics.ranking import Candidate, enough_samples, winner
from ray_jobs.metrics.resampling import (
    ReweightedFrechet,
    frechet_score,
    half_weights,
    paired_difference,
)
from ray_jobs.metrics.score import Score

WIDTH = 6
SCALES = torch.tensor([2.0, 1.5, 1.0, 0.7, 0.5, 0.3], dtype=torch.float64)
MANY = 10**6


def exact_moments() -> Moments:
    """Of a Gaussian with mean 0 and standard deviations SCALES, without a sample's error."""
    mean = torch.zeros(WIDTH, dtype=torch.float64)
    return Moments(MANY, mean, torch.diag(SCALES) * (MANY - 1) ** 0.5, "network")


def normal(count: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generated(count: int, seed: int) -> torch.Tensor:
    """Of a Gaussian with all means 1 and standard deviations 1.5 SCALES."""
    return normal(count, seed) * 1.5 * SCALES + 1


# |difference of means|^2 + sum of (difference of standard deviations)^2, the covariances being diagonal.
TRUTH = WIDTH + float((0.5 * SCALES).square().sum())


def test_two_gaussians_have_the_distance_of_the_closed_form() -> None:
    found = frechet_distance(Moments.of(generated(200_000, seed=0), "network"), exact_moments())
    assert found == pytest.approx(TRUTH, rel=0.01)


@pytest.mark.parametrize(
    ("count", "num_real"),
    [(20, 25), (20, 200), (90, 20), (90, 200)],
    ids=["few pictures", "few pictures, many real", "many pictures, few real", "many pictures"],
)
def test_a_reweighted_distance_is_that_of_the_pictures_repeated(count: int, num_real: int) -> None:
    width = 48
    real = Moments.of(normal(num_real, seed=1, width=width) + 3, "network")
    features = 1.3 * normal(count, seed=2, width=width) + 3.2
    distance = ReweightedFrechet(features, real)
    taken = [torch.ones(count, dtype=torch.int64), torch.arange(count) % 3, *half_weights(count, 3, seed=3)]
    for weights in taken:
        repeated = Moments.of(features.repeat_interleave(weights, dim=0), "network")
        assert distance(weights) == pytest.approx(frechet_distance(repeated, real), rel=1e-6)


def test_halves_repeat_no_picture_and_depend_on_the_seed_only() -> None:
    weights = half_weights(51, 20, seed=1)
    assert weights.shape == (20, 51) and set(weights.flatten().tolist()) == {0, 1}
    assert weights.sum(dim=1).tolist() == [25] * 20
    assert torch.equal(weights, half_weights(51, 20, seed=1))
    assert not torch.equal(weights, half_weights(51, 20, seed=2))
    # Every picture is as likely as every other, and so is every pair.
    many = half_weights(6, 6000, seed=0).double()
    together = many.T @ many / len(many)
    assert torch.allclose(together.diagonal(), torch.tensor(0.5).double(), atol=0.03)
    assert torch.allclose(together[~torch.eye(6, dtype=torch.bool)], torch.tensor(0.2).double(), atol=0.03)


@pytest.mark.parametrize(
    ("scale", "shift"), [(1.0, 0.0), (1.2, 0.3)], ids=["the real distribution", "another one"]
)
def test_the_error_is_near_that_of_fresh_pictures_where_they_are_hardly_more_than_features(
    scale: float, shift: float
) -> None:
    """A bootstrap sample's spread was 5.8 and 3.2 times the fresh one's here."""
    width, count = 64, 96
    factor = torch.eye(width, dtype=torch.float64) * (MANY - 1) ** 0.5
    real = Moments(MANY, torch.zeros(width, dtype=torch.float64), factor, "network")
    fresh = [
        frechet_distance(Moments.of(scale * normal(count, seed, width) + shift, "network"), real)
        for seed in range(100)
    ]
    told = [
        frechet_score(scale * normal(count, seed, width) + shift, real, num_resamples=40).standard_error or 0
        for seed in range(6)
    ]
    spread = float(torch.tensor(fresh).std())
    assert 0.9 < sum(told) / len(told) / spread < 1.6


@pytest.mark.slow
def test_the_error_covers_the_truth_as_often_as_it_should() -> None:
    # Of 150 samples, 95 % intervals should hold the closed form in 95 %, with a spread of 1.8 %.
    scores = [frechet_score(generated(400, seed), exact_moments(), seed=seed) for seed in range(150)]
    errors = [score.standard_error or 0.0 for score in scores]
    held = sum(abs(s.value - TRUTH) < 1.96 * e for s, e in zip(scores, errors, strict=True)) / len(scores)
    assert 0.88 < held < 0.995
    spread = float(torch.tensor([score.value for score in scores]).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.15)


def test_the_error_is_right_for_fewer_pictures_than_features_too() -> None:
    width, scales = 256, torch.arange(1, 257, dtype=torch.float64) ** -0.8
    factor = torch.diag(scales) * (MANY - 1) ** 0.5
    real = Moments(MANY, torch.zeros(width, dtype=torch.float64), factor, "network")
    scores = [
        frechet_score(normal(48, seed, width) * 1.2 * scales + 0.5 * scales, real, num_resamples=50)
        for seed in range(60)
    ]
    spread = float(torch.tensor([score.value for score in scores]).std())
    assert sum(score.standard_error or 0 for score in scores) / 60 == pytest.approx(spread, rel=0.25)


def test_a_score_with_an_error_is_the_plain_distance_and_names_its_network() -> None:
    features, real = generated(40, seed=0), exact_moments()
    score = frechet_score(features, real, seed=5)
    assert score.value == score.fid == frechet_distance(Moments.of(features, "network"), real)
    assert (score.num_samples, score.feature_network, score.metric) == (40, "network", "FID")
    assert score == frechet_score(features, real, seed=5)
    with pytest.raises(ValueError, match=r"evaluate\.num_samples: an error needs 4"):
        frechet_score(features[:3], real)


@pytest.mark.slow
def test_common_noise_lowers_the_variance_of_a_difference_by_the_ratio_that_is_told() -> None:
    def candidates(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A little noise of its own on the common noise, and a small difference of means."""
        common, own = generated(200, seed), normal(200, seed + 1000)
        return common, common + 0.05 + 0.2 * own * SCALES

    told = [paired_difference(*candidates(seed), exact_moments()) for seed in range(60)]
    differences = torch.tensor([pair.value for pair in told])
    unpaired = torch.tensor(
        [paired_difference(candidates(s)[0], candidates(s + 60)[1], exact_moments()).value for s in range(60)]
    )
    measured_ratio = float(unpaired.var() / differences.var())
    assert measured_ratio > 5, "common random numbers help here"
    ratios = torch.tensor([pair.variance_ratio for pair in told])
    assert float(ratios.median()) == pytest.approx(measured_ratio, rel=0.5)
    errors = torch.tensor([pair.standard_error for pair in told])
    assert float(errors.mean()) == pytest.approx(float(differences.std()), rel=0.25)


def test_candidates_without_common_noise_have_a_ratio_of_about_one() -> None:
    pair = paired_difference(generated(300, 1), generated(300, 2), exact_moments(), num_resamples=300)
    assert pair.variance_ratio == pytest.approx(1, abs=0.3)
    with pytest.raises(ValueError, match="as many pictures; got 300 and 200"):
        paired_difference(generated(300, 1), generated(200, 2), exact_moments())


def test_a_candidate_does_not_differ_from_itself() -> None:
    pair = paired_difference(generated(30, 1), generated(30, 1), exact_moments(), num_resamples=5)
    assert (pair.value, pair.standard_error, pair.variance_ratio) == (0, 0, math.inf)


def test_fid_infinity_is_nearer_to_the_truth_than_the_distance_of_all_pictures() -> None:
    # A sample's bias is a small part of its error, so it takes many samples to be seen.
    fits = [
        fid_infinity(generated(120, seed), exact_moments(), min_count=30, seed=seed) for seed in range(500)
    ]
    plain = sum(fit.distances[-1] for fit in fits) / 500 - TRUTH
    extrapolated = sum(fit.value for fit in fits) / 500 - TRUTH
    assert plain > 0.1, "a sample's distance is too high"
    assert abs(extrapolated) < plain / 2


def test_fid_infinity_tells_its_fit() -> None:
    features, real = generated(150, seed=3), exact_moments()
    fit = fid_infinity(features, real, min_count=20)
    assert (fit.counts[0], fit.counts[-1], len(fit.counts)) == (20, 150, NUM_POINTS)
    assert fit.distances[-1] == pytest.approx(frechet_distance(Moments.of(features, "network"), real))
    line = [fit.value + fit.slope / count for count in fit.counts]
    left = [y - x for x, y in zip(line, fit.distances, strict=True)]
    assert sum(left) == pytest.approx(0, abs=1e-9), "least squares"
    assert fit.residual == pytest.approx((sum(x * x for x in left) / (NUM_POINTS - 2)) ** 0.5)
    assert 0 <= fit.r_squared <= 1
    inverse = [1 / count for count in fit.counts]
    fitted = linregress(inverse, fit.distances)
    assert (fit.value, fit.slope) == pytest.approx((fitted.intercept, fitted.slope))
    assert fit.standard_error == pytest.approx(fitted.intercept_stderr)
    assert fit.feature_network == "network"
    with pytest.raises(ValueError, match=r"evaluate\.num_samples: fid_infinity needs 15 counts"):
        fid_infinity(features[:12], real)


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([(0, 0, 400), (0.5, 0.6, 100), (3, 0.6, 50)], 1),
        ([(0, 0, 400), (0.5, 0.4, 100)], 0),
        ([(0, 0, 400), (0, 0, 100)], 1),
        ([(0.5, 1, 100), (0, 0, 100)], 1),
    ],
    ids=[
        "a tie goes to fewer steps",
        "no tie: the best",
        "equal without an error: a tie",
        "as many steps: the better score",
    ],
)
def test_the_winner_costs_the_fewest_steps_of_those_that_tie_with_the_best(
    candidates: Sequence[tuple[float, float, int]], expected: int
) -> None:
    assert winner([Candidate(*candidate) for candidate in candidates]) == expected


def test_no_candidate_or_one_without_a_number_has_no_winner() -> None:
    with pytest.raises(ValueError, match="none to choose from"):
        winner([])
    with pytest.raises(ValueError, match="no number"):
        winner([Candidate(0, 0, 1), Candidate(math.nan, 1, 1)])


def test_a_ranking_may_be_noise_up_to_as_many_pictures_as_features() -> None:
    assert enough_samples(num_features=2048) == 2049


def test_scores_of_different_metrics_do_not_compare() -> None:
    with pytest.raises(ValueError, match="metric: KID and FID do not compare"):
        min(Score(1, 20, "network"), Score(1, 20, "network", metric="KID"))
