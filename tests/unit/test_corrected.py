"""The corrected Fréchet distance of few pictures is that of infinitely many, where the plain one is far off.

Features are Gaussians with known moments and a spectrum like Inception's: variance falls as 1 / rank.
"""

import pytest
import torch

from ray_jobs.metrics.corrected import (
    Correction,
    corrected_difference,
    corrected_distance,
    corrected_score,
)
from ray_jobs.metrics.frechet import Moments, frechet_distance

SIZE, COUNT, REAL = 192, 128, 256
VARIANCES = (
    100 * (1 / torch.arange(1.0, SIZE + 1, dtype=torch.float64)) / sum(1 / i for i in range(1, SIZE + 1))
)


def drawn(count: int, covariance: torch.Tensor, seed: int, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, SIZE, generator=generator, dtype=torch.float64)
    return noise @ root(covariance) + mean


def root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def true_distance(covariance: torch.Tensor, mean: float = 0.0) -> float:
    """Distance of the distributions themselves."""
    middle = root(torch.diag(VARIANCES))
    fidelity = torch.linalg.eigvalsh(middle @ covariance @ middle).clamp(min=0).sqrt().sum()
    return SIZE * mean**2 + float(covariance.trace() + VARIANCES.sum() - 2 * fidelity)


def generators() -> dict[str, tuple[torch.Tensor, float]]:
    """Covariances and means of generators: as real, pulled to the mean, with few kinds, others, shifted."""
    rotation = torch.linalg.qr(drawn(SIZE, torch.eye(SIZE, dtype=torch.float64), 7))[0]
    few = VARIANCES.clone()
    few[20:] = 0
    steep = VARIANCES**1.4 * VARIANCES.sum() / (VARIANCES**1.4).sum()
    return {
        "as real": (torch.diag(VARIANCES), 0.0),
        "pulled by 0.7": (torch.diag(VARIANCES) * 0.49, 0.0),
        "wider by 1.2": (torch.diag(VARIANCES) * 1.44, 0.0),
        "few directions": (torch.diag(few), 0.0),
        "steeper": (torch.diag(steep), 0.0),
        "half of it elsewhere": (
            (torch.diag(VARIANCES) + rotation @ torch.diag(VARIANCES) @ rotation.T) / 2,
            0.0,
        ),
        "shifted": (torch.diag(VARIANCES), 0.3),
    }


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return drawn(REAL, torch.diag(VARIANCES), 1)


@pytest.fixture(scope="module")
def real(pictures: torch.Tensor) -> Moments:
    return Moments.of(pictures)


@pytest.fixture(scope="module")
def correction(pictures: torch.Tensor) -> Correction:
    found = Correction.of(pictures, drawn(2 * REAL, torch.diag(VARIANCES), 2), COUNT)
    assert found is not None
    return found


@pytest.mark.parametrize("name", generators())
def test_few_pictures_give_the_distance_of_the_distributions(
    real: Moments, correction: Correction, name: str
) -> None:
    covariance, mean = generators()[name]
    samples = [drawn(COUNT, covariance, 10 + i, mean) for i in range(6)]
    truth = true_distance(covariance, mean)
    found = sum(corrected_distance(each, real, correction) for each in samples) / 6
    plain = sum(frechet_distance(Moments.of(each), real) for each in samples) / 6
    assert abs(found - truth) < 1
    assert plain - truth > (3 if name == "few directions" else 15)


def test_the_distance_is_lowest_at_the_spread_of_the_real_pictures(
    real: Moments, correction: Correction
) -> None:
    """The plain distance of 128 pictures is lowest at a smaller one."""
    others, factors = drawn(4 * COUNT, torch.diag(VARIANCES), 5), [0.6 + 0.05 * i for i in range(17)]
    lowest = {}
    for name in ("plain", "corrected"):
        distances = []
        for factor in factors:
            parts = [part * factor for part in others.split(COUNT)]
            if name == "plain":
                found = [frechet_distance(Moments.of(part), real) for part in parts]
            else:
                found = [corrected_distance(part, real, correction) for part in parts]
            distances.append(sum(found))
        lowest[name] = factors[distances.index(min(distances))]
    assert abs(lowest["corrected"] - 1) <= 0.051 and lowest["plain"] < 0.9


def test_few_pictures_samplesagain_and_again_are_not_rewarded(real: Moments, correction: Correction) -> None:
    few = drawn(COUNT // 8, torch.diag(VARIANCES), 6).repeat(8, 1)
    assert corrected_distance(few, real, correction) > 50


@pytest.mark.parametrize("name", generators())
def test_the_error_is_the_spread_of_other_samples(real: Moments, correction: Correction, name: str) -> None:
    covariance, mean = generators()[name]
    samples = [drawn(COUNT, covariance, 20 + i, mean) for i in range(30)]
    spread = float(torch.tensor([corrected_distance(each, real, correction) for each in samples]).std())
    scores = [corrected_score(each, real, correction, num_resamples=40) for each in samples[:5]]
    told = [score.standard_error or 0.0 for score in scores]
    print(name, sum(told) / 5, spread)
    assert 0.7 < sum(told) / len(told) / spread < 1.9
    assert {score.metric for score in scores} == {"corrected FID"}


def test_pairs_on_common_noise_differ_by_less_than_others(real: Moments, correction: Correction) -> None:
    samples = drawn(COUNT, torch.diag(VARIANCES), 30)
    found = corrected_difference(samples, samples * 0.95, real, correction, num_resamples=40)
    assert found.standard_error < 0.5 and found.variance_ratio > 4
    values = [corrected_distance(each, real, correction) for each in (samples, samples * 0.95)]
    assert found.value == pytest.approx(values[0] - values[1])
    with pytest.raises(ValueError, match="pairs need as many pictures"):
        corrected_difference(samples, samples[:100], real, correction)


def test_a_correction_is_for_one_number_of_pictures_and_needs_as_many_real_ones(
    pictures: torch.Tensor, real: Moments, correction: Correction
) -> None:
    assert Correction.of(pictures, drawn(COUNT - 1, torch.diag(VARIANCES), 3), COUNT) is None
    assert Correction.of(pictures, drawn(COUNT, torch.diag(VARIANCES), 3), 7) is None
    assert Correction.of(pictures[:7], drawn(COUNT, torch.diag(VARIANCES), 3), COUNT) is None
    with pytest.raises(ValueError, match="100 pictures, and a correction for 128"):
        corrected_distance(drawn(100, torch.diag(VARIANCES), 4), real, correction)


def test_many_pictures_need_hardly_any_correction() -> None:
    size, variances = 24, VARIANCES[:24]

    def sample(count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, size, generator=generator, dtype=torch.float64) * variances.sqrt()

    pictures = sample(2000, 1)
    correction = Correction.of(pictures, sample(1500, 2), 1200)
    assert correction is not None
    wide, real = sample(1200, 3) * 1.2, Moments.of(pictures)
    found, plain = corrected_distance(wide, real, correction), frechet_distance(Moments.of(wide), real)
    assert abs(found - 0.04 * float(variances.sum())) < 0.6 and abs(found - plain) < 0.6


@pytest.mark.parametrize("count", [8, 9, 11])
def test_the_fewest_pictures_have_a_score_with_an_error(
    pictures: torch.Tensor, real: Moments, count: int
) -> None:
    correction = Correction.of(pictures, drawn(REAL, torch.diag(VARIANCES), 2), count)
    assert correction is not None
    score = corrected_score(drawn(count, torch.diag(VARIANCES), 4), real, correction)
    assert abs(score.value) < 60 and (score.standard_error or 0) > 0
