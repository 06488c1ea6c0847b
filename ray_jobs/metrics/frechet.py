"""Fréchet distance between two sets of feature vectors. Pure PyTorch, in float64."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of a set of feature vectors; `+` gives those of the union.

    The scatter matrix, the sum of (x - mean)(x - mean)^T, is stored as a factor F with F^T F = scatter. For
    few pictures F is small (the centred features themselves); for many it never exceeds 2D x D. The distance
    then needs no matrix square root: see `frechet_distance`.
    """

    count: int
    mean: torch.Tensor  # float64, D
    factor: torch.Tensor  # float64, rows x D
    feature_network: str  # moments of different networks must not be combined

    @classmethod
    def of(cls, features: torch.Tensor, feature_network: str = "unnamed") -> "Moments":
        """Compute the moments of `features` (float, N x D) from the network of that name.

        Raises:
            ValueError: there are no features, or some are not finite.
        """
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"features: N x D with N at least 1, not {tuple(features.shape)}")
        features = features.detach().cpu().double()
        if not features.isfinite().all():
            raise ValueError("features: some are not finite; the pictures or the network are broken")
        mean = features.mean(dim=0)
        return cls(len(features), mean, _shorten(features - mean), feature_network)

    def __add__(self, other: "Moments") -> "Moments":
        """Combine the moments of two sets, in any order (Chan, Golub & LeVeque 1983, eq. 2.1)."""
        require_same_network(self.feature_network, other.feature_network)
        count = self.count + other.count
        apart = other.mean - self.mean
        between = apart * (self.count * other.count / count) ** 0.5
        factor = _shorten(torch.cat([self.factor, other.factor, between[None]]))
        return Moments(count, self.mean + apart * (other.count / count), factor, self.feature_network)

    @property
    def trace(self) -> float:
        """Sum of the features' unbiased variances."""
        return float(self.factor.square().sum() / (self.count - 1))

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased covariance matrix: float64, D x D."""
        return self.factor.T @ self.factor / (self.count - 1)


def _shorten(factor: torch.Tensor) -> torch.Tensor:
    """Reduce F to at most 2D rows with the same F^T F = R^T R, by F = QR.

    The limit is 2D, so that few merges need a QR decomposition.
    """
    if len(factor) <= 2 * factor.shape[1]:
        return factor
    return torch.linalg.qr(factor, mode="r").R


def require_same_network(one: str, other: str) -> None:
    """Raise ValueError if two values come from different feature networks."""
    if one != other:
        raise ValueError(f"feature_network: {one} and {other} measure different things; use one of them")


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance; FID if the features are Inception's (Heusel et al., arXiv 1706.08500, eq. 6).

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). With S_a = A^T A and S_b = B^T B, the
    eigenvalues of S_a S_b are the squared singular values of A B^T, so the trace of the root is the sum of
    the singular values. For few pictures this needs a count x count matrix, instead of the eigenvalues of a
    non-symmetric D x D matrix.

    Raises:
        ValueError: a set has fewer than 2 pictures, or the feature networks differ.
    """
    require_same_network(a.feature_network, b.feature_network)
    if min(a.count, b.count) < 2:
        raise ValueError(f"evaluate.num_samples: FID needs 2 pictures a set; got {a.count} and {b.count}")
    left, right = a.factor / (a.count - 1) ** 0.5, b.factor / (b.count - 1) ** 0.5
    means = (a.mean - b.mean).square().sum()
    traces = left.square().sum() + right.square().sum()
    root = torch.linalg.svdvals(left @ right.T).sum()
    # For equal sets the result is a rounding error of either sign; a distance is not negative.
    return max(0.0, float(means + traces - 2 * root))
