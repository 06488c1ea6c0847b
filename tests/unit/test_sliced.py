"""MIND: by hand, against closed forms of Gaussians, and against drawing the pictures again."""

import pytest
import torch

from ray_jobs.metrics.sliced import NUM_DIRECTIONS, SCALE, mind_difference, mind_score, sliced_distance
from tests.unit.test_corrected import COUNT, REAL, SIZE, VARIANCES, drawn, generators

REAL_COVARIANCE = torch.diag(VARIANCES)
# Three relative errors of a mean of (u . a)^2 over so many directions.
OF_DIRECTIONS = 3 * (2 / NUM_DIRECTIONS) ** 0.5


def column(*values: float) -> torch.Tensor:
    """Return pictures of one feature, whose only directions are 1 and -1."""
    return torch.tensor(values)[:, None]


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    return drawn(REAL, REAL_COVARIANCE, 1)


def test_of_one_feature_it_is_the_squared_distance_of_sorted_values_worked_by_hand() -> None:
    assert sliced_distance(column(0, 4, 1), column(5, 2, 0)) == pytest.approx(SCALE * (0 + 1 + 1) / 3)
    # Quantiles of 0, 2 and of 1, 3, 5 meet for a third of the pictures, a sixth, a sixth, and a third.
    by_hand = 1 / 3 * 1**2 + 1 / 6 * 3**2 + 1 / 6 * 1**2 + 1 / 3 * 3**2
    assert sliced_distance(column(2, 0), column(5, 1, 3)) == pytest.approx(SCALE * by_hand)


def test_equal_sets_have_distance_0_in_any_order_and_it_is_symmetric(real: torch.Tensor) -> None:
    other = drawn(COUNT, REAL_COVARIANCE, 2)
    assert sliced_distance(real, real.clone()) == 0
    assert sliced_distance(real, real.flip(0)) == pytest.approx(0, abs=1e-12)
    assert sliced_distance(real, other) == pytest.approx(sliced_distance(other, real), rel=1e-12)
    assert sliced_distance(real, other) > 0


def test_every_picture_twice_changes_nothing(real: torch.Tensor) -> None:
    other = drawn(COUNT, REAL_COVARIANCE, 2)
    twice = sliced_distance(real.repeat(2, 1), other.repeat(3, 1))
    assert twice == pytest.approx(sliced_distance(real, other), rel=1e-12)


def test_a_shift_counts_as_in_fid_and_a_spread_too_but_three_times() -> None:
    """The closed forms are |a|^2 and (c - 1)^2 times the trace of the covariance."""
    pictures = drawn(1000, REAL_COVARIANCE, 3)
    shift = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    by_shift = sliced_distance(pictures + shift, pictures)
    assert by_shift == pytest.approx(SCALE * float(shift.square().sum()), rel=OF_DIRECTIONS)
    trace = float(VARIANCES.sum())
    for factor in (0.5, 1.5):
        found = sliced_distance(factor * pictures, pictures)
        assert found == pytest.approx(SCALE * (factor - 1) ** 2 * trace, rel=OF_DIRECTIONS)


def test_it_is_lowest_within_5_percent_of_the_true_spread(real: torch.Tensor) -> None:
    """Of 128 pictures, where FID is lowest at less than 0.9 (test_corrected.py)."""
    others, factors = drawn(4 * COUNT, REAL_COVARIANCE, 5), [0.8 + 0.02 * i for i in range(21)]
    distances = [
        sum(sliced_distance(part * factor, real) for part in others.split(COUNT)) for factor in factors
    ]
    assert abs(factors[distances.index(min(distances))] - 1) <= 0.05


@pytest.mark.parametrize("name", generators())
def test_its_error_is_the_spread_of_other_samples(real: torch.Tensor, name: str) -> None:
    covariance, mean = generators()[name]
    samples = [drawn(COUNT, covariance, 20 + i, mean) for i in range(60)]
    scores = [mind_score(each, real, "network") for each in samples]
    spread = float(torch.tensor([score.value for score in scores]).std())
    told = sum(score.standard_error or 0.0 for score in scores) / len(scores)
    assert 0.7 < told / spread < 1.4
    assert {(score.metric, score.num_samples, score.feature_network) for score in scores} == {
        ("MIND", COUNT, "network")
    }
    assert mind_score(samples[0], real, "network", has_error=False).standard_error is None


def test_pairs_that_share_their_noise_differ_by_less_than_others(real: torch.Tensor) -> None:
    samples = [drawn(COUNT, REAL_COVARIANCE, 30 + i) for i in range(40)]
    values = torch.tensor([[sliced_distance(each * f, real) for f in (1, 0.95)] for each in samples])
    found = [mind_difference(each, each * 0.95, real, "network") for each in samples[:6]]
    assert found[0].value == pytest.approx(float(values[0, 0] - values[0, 1]))
    spread = float((values[:, 0] - values[:, 1]).std())
    assert 0.6 < sum(each.standard_error for each in found) / 6 / spread < 1.6
    assert all(each.variance_ratio > 4 and each.num_samples == COUNT for each in found)
    same = mind_difference(samples[0], samples[0], real, "network")
    assert (same.value, same.standard_error) == (0, 0)


def test_sets_that_do_not_fit_are_refused(real: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="N x D with N at least 1"):
        sliced_distance(real[:0], real)
    with pytest.raises(ValueError, match="of the two sets differ"):
        sliced_distance(real[:, :5], real)
    with pytest.raises(ValueError, match="pairs need as many pictures"):
        mind_difference(real, real[:5], real, "network")
