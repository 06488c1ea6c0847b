"""The Fréchet distance between two sets of feature vectors. Pure PyTorch, in float64."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of a set of feature vectors; `+` gives those of the union.

    The scatter matrix, the sum of (x - mean)(x - mean)^T, is held as a factor F with F^T F = scatter. For
    few pictures that is small (the centred features themselves), for many it is never above 2D x D, and
    the distance needs no matrix square root: see `frechet_distance`.
    """

    count: int
    mean: torch.Tensor  # float64, D
    factor: torch.Tensor  # float64, rows x D
    feature_network: str  # moments of different networks never meet

    @classmethod
    def of(cls, features: torch.Tensor, feature_network: str = "unnamed") -> "Moments":
        """The moments of `features` (float, N x D), made by the network of that name.

        Raises:
            ValueError: if there are none, or one is not finite.
        """
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"features: N x D with N at least 1, not {tuple(features.shape)}")
        features = features.detach().cpu().double()
        if not features.isfinite().all():
            raise ValueError("features: some are not finite; the pictures or the network are broken")
        mean = features.mean(dim=0)
        return cls(len(features), mean, _shorten(features - mean), feature_network)

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets together (Chan, Golub & LeVeque 1983, eq. 2.1), in any order."""
        require_same_network(self.feature_network, other.feature_network)
        count = self.count + other.count
        apart = other.mean - self.mean
        between = apart * (self.count * other.count / count) ** 0.5
        factor = _shorten(torch.cat([self.factor, other.factor, between[None]]))
        return Moments(count, self.mean + apart * (other.count / count), factor, self.feature_network)

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased covariance matrix: float64, D x D."""
        return self.factor.T @ self.factor / (self.count - 1)


def _shorten(factor: torch.Tensor) -> torch.Tensor:
    """The same F^T F in at most 2D rows: F = QR gives R^T R. At 2D, so that few merges pay for a QR."""
    if len(factor) <= 2 * factor.shape[1]:
        return factor
    return torch.linalg.qr(factor, mode="r").R


def require_same_network(one: str, other: str) -> None:
    """Raises ValueError if two numbers come from different feature networks."""
    if one != other:
        raise ValueError(f"feature_network: {one} and {other} measure different things; use one of them")


def frechet_distance(a: Moments, b: Moments) -> float:
    """FID where the features are Inception's (Heusel et al., arXiv 1706.08500, eq. 6).

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). With S_a = A^T A and S_b = B^T B the
    eigenvalues of S_a S_b are the squared singular values of A B^T, so the trace of the root is their sum:
    a matrix of count x count for few pictures, instead of the eigenvalues of a non-symmetric D x D one.

    Raises:
        ValueError: if a set has fewer than 2 pictures, or the feature networks differ.
    """
    require_same_network(a.feature_network, b.feature_network)
    if min(a.count, b.count) < 2:
        raise ValueError(f"evaluate.num_samples: FID needs 2 pictures a set; got {a.count} and {b.count}")
    left, right = a.factor / (a.count - 1) ** 0.5, b.factor / (b.count - 1) ** 0.5
    means = (a.mean - b.mean).square().sum()
    traces = left.square().sum() + right.square().sum()
    root = torch.linalg.svdvals(left @ right.T).sum()
    # Of equal sets the difference is rounding of either sign; a distance is not negative.
    return max(0.0, float(means + traces - 2 * root))
