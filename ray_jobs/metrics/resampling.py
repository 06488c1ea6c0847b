"""Standard error of a Fréchet distance, from halves of the generated pictures. Pure PyTorch, in float64.

A bootstrap sample would repeat pictures, which a distance of few pictures mistakes for less variety. Its
spread is up to five times that of fresh samples (96 pictures from a Gaussian with 64 features: 2.0 instead of
0.34), and its interval does not even contain the sample's own distance. Halves repeat no picture. Their
spread, scaled for the omitted pictures, is that of the whole (the delete-d jackknife: Shao & Wu, Annals of
Statistics 17, 1989); it is at most one and a half times too large if there are hardly more pictures than
features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ray_jobs.metrics.frechet import Moments, frechet_distance
from ray_jobs.metrics.score import Score

NUM_RESAMPLES = 100  # halves; the relative error of the error is then 7 %
FEWEST = 4  # pictures; half of them still have a covariance


@dataclass(frozen=True)
class Parts:
    """Parts of a Fréchet distance, besides the trace of the real covariance.

    Attributes:
        means: squared distance of the means.
        trace: of the generated covariance.
        fidelity: trace of the root of the covariances' product; it is subtracted twice.
    """

    means: float
    trace: float
    fidelity: float


class ReweightedFrechet:
    """Fréchet distance to fixed real moments, with generated picture i counted w_i times.

    With X the centred generated features, W = diag(w) and S = B^T B the real covariance, the trace of the
    root is the sum of the singular values of W^(1/2) X B^T: see `frechet_distance`. X B^T does not depend on
    w, so a new w needs only the eigenvalues of a matrix derived from it: u x u for the u pictures counted at
    least once (half of them), or D x D if the pictures outnumber the features. This costs O(u^3) instead of
    O(u^2 D + u^3), or O(N D^2) once instead of twice. It agrees with the plain distance to 1e-6.
    """

    def __init__(self, features: torch.Tensor, real: Moments) -> None:
        """Precompute products for generated `features`: float, N x D, on the device that is to compute."""
        device = features.device
        # Relative to the real mean, so that the distance of the means loses no digits.
        self.features = features.detach().double() - real.mean.to(device)
        self.norms = self.features.square().sum(dim=1)
        factor = real.factor.to(device) / (real.count - 1) ** 0.5
        self.real_trace = factor.square().sum()
        if len(factor) > factor.shape[1]:
            factor = torch.linalg.qr(factor, mode="r").R
        self.projected = self.features @ factor.T  # N x k, k at most D
        by_pictures = len(features) <= len(factor)
        self.products = self.projected @ self.projected.T if by_pictures else None

    def __call__(self, weights: torch.Tensor) -> float:
        """Compute the distance for `weights`: int64, N, not negative, summing to at least 2."""
        parts = self.parts(weights)
        return max(0.0, parts.means + parts.trace + float(self.real_trace) - 2 * parts.fidelity)

    def parts(self, weights: torch.Tensor) -> Parts:
        """Compute what the distance is made of, for such weights."""
        counted = weights.nonzero()[:, 0]
        w = weights[counted].to(self.features)
        taken = counted.to(self.features.device)
        total = float(w.sum())
        mean = w @ self.features[taken] / total
        trace = (w @ self.norms[taken] - total * mean.square().sum()) / (total - 1)
        gram = self._gram(taken, w, total)
        root = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum() / (total - 1) ** 0.5
        return Parts(float(mean.square().sum()), float(trace), float(root))

    def _gram(self, taken: torch.Tensor, w: torch.Tensor, total: float) -> torch.Tensor:
        """Gram matrix of W^(1/2) X B^T along its shorter side."""
        rows = self.projected[taken]
        if self.products is not None:
            inner = self.products[taken][:, taken]
        elif len(rows) < rows.shape[1]:
            inner = rows @ rows.T
        else:
            mean = w @ rows / total
            return rows.T @ (w[:, None] * rows) - total * torch.outer(mean, mean)
        toward_mean = inner @ w / total
        centred = inner - toward_mean - toward_mean[:, None] + w @ toward_mean / total
        return w.sqrt() * centred * w.sqrt()[:, None]


def half_weights(count: int, num_resamples: int, seed: int) -> torch.Tensor:
    """Weights (0 or 1) of `count` pictures in random halves, rounded down: int64, num_resamples x count."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(num_resamples, count, generator=generator).argsort(dim=1)[:, : count // 2]
    return torch.zeros(num_resamples, count, dtype=torch.int64).scatter_(1, chosen, 1)


def frechet_score(
    features: torch.Tensor, real: Moments, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Score:
    """Fréchet distance of generated pictures to real ones, with its standard error.

    The error covers the sampling of captions and noise for the same model. The real set is fixed, since all
    candidates share it. At least half of the error comes from the captions, which candidates share too, so
    compare two candidates with `paired_difference`. The error does not include the bias of the sample size.

    Args:
        features: features of the generated pictures from `real.feature_network`; float, N x D, N at least 4.
    """
    value = frechet_distance(Moments.of(features, real.feature_network), real)
    spread = float(replicates(features, real, num_resamples, seed).std())
    return Score(value, len(features), real.feature_network, error_of_all(spread, len(features)))


def replicates(features: torch.Tensor, real: Moments, num_resamples: int, seed: int) -> torch.Tensor:
    """Fréchet distances of random halves: float64, num_resamples."""
    if len(features) < FEWEST:
        raise ValueError(f"evaluate.num_samples: an error needs {FEWEST} pictures; got {len(features)}")
    distance = ReweightedFrechet(features, real)
    weights = half_weights(len(features), num_resamples, seed)
    return torch.tensor([distance(w) for w in weights], dtype=torch.float64)


def error_of_all(spread: float, count: int) -> float:
    """Standard error of `count` pictures from the standard deviation over their halves."""
    half = count // 2
    return spread * (half / (count - half)) ** 0.5


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two candidates' scores on the same captions and noise.

    Attributes:
        value: first score minus the second.
        variance_ratio: sum of the two variances divided by the variance of the difference, the factor by
            which common captions and noise reduce the variance; 1 means no reduction.
    """

    value: float
    standard_error: float
    variance_ratio: float
    num_samples: int
    feature_network: str


def paired_difference(
    one: torch.Tensor,
    other: torch.Tensor,
    real: Moments,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """Compare two candidates whose picture i was sampled from the same caption and noise.

    Each random half takes the same pictures of both, so that the effect of the common random numbers cancels.

    Args:
        one, other: features from `real.feature_network`; float, N x D each.

    Raises:
        ValueError: the shapes differ.
    """
    require_pairs(one, other)
    first, second = (replicates(features, real, num_resamples, seed) for features in (one, other))
    values = [frechet_distance(Moments.of(each, real.feature_network), real) for each in (one, other)]
    error_of = partial(error_of_all, count=len(one))
    return difference_of(values[0] - values[1], first, second, error_of, len(one), real.feature_network)


def require_pairs(one: torch.Tensor, other: torch.Tensor) -> None:
    """Raise ValueError if two sets have different numbers of pictures or features."""
    if one.shape != other.shape:
        raise ValueError(f"num_samples: pairs need as many pictures; got {len(one)} and {len(other)}")


def difference_of(
    value: float,
    first: torch.Tensor,
    second: torch.Tensor,
    error_of: Callable[[float], float],
    count: int,
    network: str,
) -> PairedDifference:
    """Return a difference with its error.

    Args:
        first, second: both candidates' scores of the same parts of their `count` pictures, or these pictures'
            influences on them: float64, M.
        error_of: from the standard deviation of such values to the standard error of all pictures.
    """
    variance = float((first - second).var())
    apart = float(first.var() + second.var())
    ratio = apart / variance if variance > 0 else float("inf")
    return PairedDifference(value, error_of(variance**0.5), ratio, count, network)
