"""Kernel distance between two sets of feature vectors. Pure PyTorch, in float64."""

from collections.abc import Callable

import torch

from ray_jobs.metrics.resampling import PairedDifference, difference_of, require_pairs
from ray_jobs.metrics.score import Score

METRIC = "KID"
NUM_SUBSETS = 100
SUBSET_SIZE = 1000


def squared_mmd(one: torch.Tensor, other: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3.

    Bińkowski et al., arXiv 1801.01401, equations 3 and 4 (Gretton et al. 2012, lemma 6). An unbiased estimate
    may be negative.

    Args:
        one, other: float, N x D and M x D; N and M at least 2.
    """
    one, other = one.double(), other.double()
    count, count_other = len(one), len(other)
    within = _sum_apart(_kernel(one, one)) / (count * (count - 1))
    within_other = _sum_apart(_kernel(other, other)) / (count_other * (count_other - 1))
    return float(within + within_other - 2 * _kernel(one, other).mean())


def _kernel(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one @ other.T / one.shape[1] + 1) ** 3


def _sum_apart(matrix: torch.Tensor) -> torch.Tensor:
    """Sum of the off-diagonal elements."""
    return matrix.sum() - matrix.diagonal().sum()


def kernel_distance(
    generated: torch.Tensor,
    real: torch.Tensor,
    feature_network: str,
    *,
    num_subsets: int = NUM_SUBSETS,
    subset_size: int | None = None,
    seed: int = 0,
) -> Score:
    """KID: the mean of `squared_mmd` over random subsets, with a standard error.

    The usual deviation between subsets is that of a score of `subset_size` pictures, not of all N (the
    smaller of both counts). A subset of m of N pictures has the variance (1 - m / N) / m, so the variance of
    the whole is the subsets' times m / (N - m) (Politis & Romano 1994). For subsets of half the pictures the
    two are equal. If both sets have the same distribution, the error is up to twice too large, since the
    variance then falls faster. Unlike the error of a Fréchet distance, it includes the sampling of the real
    pictures.

    Args:
        generated, real: features, float, N x D and M x D, at least 4 of each.
        feature_network: identity of the network that computed both.
        subset_size: less than the smaller count; default: 1,000 or half of that count, whichever is smaller.
            Memory grows with its square.

    Raises:
        ValueError: there are too few pictures for the subsets.
    """
    found, error_of = _of_subsets(generated, real, num_subsets, subset_size, seed)
    error = error_of(float(found.std()))
    return Score(float(found.mean()), len(generated), feature_network, error, METRIC)


def kernel_difference(
    one: torch.Tensor,
    other: torch.Tensor,
    real: torch.Tensor,
    feature_network: str,
    *,
    num_subsets: int = NUM_SUBSETS,
    seed: int = 0,
) -> PairedDifference:
    """Compare two candidates whose picture i was sampled from the same caption and noise, by KID.

    Each subset takes the same pictures of both, and the same real ones, so that what they have in common
    cancels; see `resampling.paired_difference`.

    Args:
        one, other: features from `feature_network`; float, N x D each.
        real: float, M x D.

    Raises:
        ValueError: the shapes differ, or there are too few pictures for the subsets.
    """
    require_pairs(one, other)
    (first, error_of), (second, _) = (
        _of_subsets(each, real, num_subsets, None, seed) for each in (one, other)
    )
    value = float(first.mean() - second.mean())
    return difference_of(value, first, second, error_of, len(one), feature_network)


def _of_subsets(
    generated: torch.Tensor, real: torch.Tensor, num_subsets: int, subset_size: int | None, seed: int
) -> tuple[torch.Tensor, Callable[[float], float]]:
    """Return `squared_mmd` of random subsets (float64, num_subsets), and the error from its deviation."""
    count = min(len(generated), len(real))
    size = min(SUBSET_SIZE, count // 2) if subset_size is None else subset_size
    if not 2 <= size < count or num_subsets < 2:
        raise ValueError(
            f"KID: needs 2 subsets or more, of 2 pictures or more, and fewer than there are; got"
            f" {num_subsets} of {size} of {count}"
        )
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(num_subsets):
        part = real[torch.randperm(len(real), generator=generator)[:size]]
        other = generated[torch.randperm(len(generated), generator=generator)[:size]]
        distances.append(squared_mmd(part, other))
    scale = (size / (count - size)) ** 0.5
    return torch.tensor(distances, dtype=torch.float64), lambda spread: spread * scale
