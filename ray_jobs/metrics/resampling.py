"""The error of a Fréchet distance, from halves of the generated pictures. Pure PyTorch, in float64.

A bootstrap sample would repeat pictures, which a distance of few pictures takes for less variety: its spread
is up to five times that of other pictures (96 of a Gaussian with 64 features: 2.0 where fresh samples have
0.34), and its interval does not even hold the sample's own distance. Halves repeat none; their spread, scaled
for the pictures that they leave out, is that of the whole (the jackknife that deletes d pictures: Shao & Wu,
Annals of Statistics 17, 1989), and at most one and a half times too large where pictures are hardly more than
features.
"""

from dataclasses import dataclass

import torch

from ray_jobs.metrics.frechet import Moments, frechet_distance
from ray_jobs.metrics.score import Score

NUM_RESAMPLES = 100  # halves; the error of the error is then 7 %
FEWEST = 4  # pictures, of which a half has a covariance


class ReweightedFrechet:
    """The Fréchet distance to fixed real moments of generated pictures that are taken w_i times each.

    With X the centred generated features, W = diag(w) and S = B^T B the real covariance, the root's trace is
    the sum of the singular values of W^(1/2) X B^T: see `frechet_distance`. X B^T does not depend on w, so a
    new w needs only the eigenvalues of a matrix made from it, of u x u for the u pictures taken at least once
    (half of them), or of D x D where the pictures outnumber the features: O(u^3) instead of
    O(u^2 D + u^3), or O(N D^2) instead of O(N D^2) twice over. To 1e-6 of the plain distance.
    """

    def __init__(self, features: torch.Tensor, real: Moments) -> None:
        """Of generated `features`: float, N x D."""
        # From the real mean on, so that the distance of the means loses no digits.
        self.features = features.detach().cpu().double() - real.mean
        self.norms = self.features.square().sum(dim=1)
        factor = real.factor / (real.count - 1) ** 0.5
        self.real_trace = factor.square().sum()
        if len(factor) > factor.shape[1]:
            factor = torch.linalg.qr(factor, mode="r").R
        self.projected = self.features @ factor.T  # N x k, k at most D
        by_pictures = len(features) <= len(factor)
        self.products = self.projected @ self.projected.T if by_pictures else None

    def __call__(self, weights: torch.Tensor) -> float:
        """The distance for `weights`: int64, N, not negative, at least two pictures in all."""
        taken = weights.nonzero()[:, 0]
        w = weights[taken].double()
        total = float(w.sum())
        mean = w @ self.features[taken] / total
        trace = (w @ self.norms[taken] - total * mean.square().sum()) / (total - 1)
        gram = self._gram(taken, w, total)
        root = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum() / (total - 1) ** 0.5
        return max(0.0, float(mean.square().sum() + trace + self.real_trace - 2 * root))

    def _gram(self, taken: torch.Tensor, w: torch.Tensor, total: float) -> torch.Tensor:
        """The product of W^(1/2) X B^T with its transpose, on its shorter side."""
        if self.products is None:
            rows = self.projected[taken]
            mean = w @ rows / total
            return rows.T @ (w[:, None] * rows) - total * torch.outer(mean, mean)
        inner = self.products[taken][:, taken]
        toward_mean = inner @ w / total
        centred = inner - toward_mean - toward_mean[:, None] + w @ toward_mean / total
        return w.sqrt() * centred * w.sqrt()[:, None]


def half_weights(count: int, num_resamples: int, seed: int) -> torch.Tensor:
    """Which of `count` pictures are in each random half, rounded down: int64, num_resamples x count."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(num_resamples, count, generator=generator).argsort(dim=1)[:, : count // 2]
    return torch.zeros(num_resamples, count, dtype=torch.int64).scatter_(1, chosen, 1)


def frechet_score(
    features: torch.Tensor, real: Moments, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Score:
    """The Fréchet distance of generated pictures to real ones, with its standard error.

    The error is that of other captions and other noise for the same model; the real set is fixed, since every
    candidate meets the same one. Captions make half and more of it, and candidates share them: to tell two of
    them apart take `paired_difference`. It says nothing of the bias that all samples of a size share.

    Args:
        features: of the generated pictures, by `real.feature_network`; float, N x D, N at least 4.
    """
    value = frechet_distance(Moments.of(features, real.feature_network), real)
    spread = float(_replicates(features, real, num_resamples, seed).std())
    return Score(value, len(features), real.feature_network, _of_all(spread, len(features)))


def _replicates(features: torch.Tensor, real: Moments, num_resamples: int, seed: int) -> torch.Tensor:
    """Distances of halves: float64, num_resamples."""
    if len(features) < FEWEST:
        raise ValueError(f"evaluate.num_samples: an error needs {FEWEST} pictures; got {len(features)}")
    distance = ReweightedFrechet(features, real)
    weights = half_weights(len(features), num_resamples, seed)
    return torch.tensor([distance(w) for w in weights], dtype=torch.float64)


def _of_all(spread: float, count: int) -> float:
    """The standard error of `count` pictures from the standard deviation over their halves."""
    half = count // 2
    return spread * (half / (count - half)) ** 0.5


@dataclass(frozen=True)
class PairedDifference:
    """How much worse a candidate is than another on the same captions and noise.

    Attributes:
        value: the first's distance less the second's.
        variance_ratio: how many times the variance of the difference would be if the two had drawn other
            captions from other noise: the sum of the two variances over that of the difference. What common
            captions and common noise save together; 1: nothing.
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
    """Compare two candidates whose picture i came from the same caption and noise.

    Picture i of both is drawn together, so that what the common random numbers do to both cancels.

    Args:
        one, other: features by `real.feature_network`; float, N x D each.

    Raises:
        ValueError: if they are not as many.
    """
    if one.shape != other.shape:
        raise ValueError(f"num_samples: pairs need as many pictures; got {len(one)} and {len(other)}")
    first, second = (_replicates(features, real, num_resamples, seed) for features in (one, other))
    network = real.feature_network
    value = frechet_distance(Moments.of(one, network), real) - frechet_distance(
        Moments.of(other, network), real
    )
    variance = float((first - second).var())
    apart = float(first.var() + second.var())
    ratio = apart / variance if variance > 0 else float("inf")
    return PairedDifference(value, _of_all(variance**0.5, len(one)), ratio, len(one), network)
