"""Fréchet distance extrapolated to infinitely many pictures. Pure PyTorch."""

from dataclasses import dataclass

import torch

from ray_jobs.metrics.frechet import Moments
from ray_jobs.metrics.resampling import ReweightedFrechet

NUM_POINTS = 15  # as in the paper


@dataclass(frozen=True)
class FidInfinity:
    """Straight line through distances as a function of 1 / count: value + slope / count.

    Attributes:
        value: distance at infinitely many pictures; may be negative if the fit is bad.
        standard_error: error of the value from least squares, in the distance's unit. It covers the line fit
            only: points share pictures, so sampling other pictures changes the value by more.
        slope: increase of the distance with 1 / count.
        counts: number of pictures of each point, ascending.
        distances: distances at these counts.
        residual: standard deviation of the points from the line, in the distance's unit. Compared with the
            correction |value - distances[-1]|, it shows the quality of the extrapolation.
        r_squared: share of the points' variance that the line explains.
    """

    value: float
    standard_error: float
    slope: float
    counts: tuple[int, ...]
    distances: tuple[float, ...]
    residual: float
    r_squared: float
    feature_network: str


def fid_infinity(
    features: torch.Tensor, real: Moments, *, min_count: int | None = None, seed: int = 0
) -> FidInfinity:
    """FID without the bias of the sample size (Chong & Forsyth, arXiv 1911.07023, section 3).

    To first order the distance of N pictures is linear in 1 / N. It is measured on random subsets of 15
    counts, evenly spaced up to all pictures, and the fitted line is evaluated at 1 / N = 0. First order holds
    for N well above the number of features; below that the points curve, and the line corrects only part of
    the bias. The bias from the number of real pictures remains.

    Args:
        features: features of the generated pictures from `real.feature_network`; float, N x D.
        min_count: count of the first point; default: a tenth of the pictures, as in the paper.

    Raises:
        ValueError: there are too few pictures for that many points.
    """
    count = len(features)
    start = max(2, count // 10) if min_count is None else min_count
    counts = torch.linspace(start, count, NUM_POINTS).round().long().tolist()
    if start < 2 or len(set(counts)) < NUM_POINTS:
        raise ValueError(
            f"evaluate.num_samples: fid_infinity needs {NUM_POINTS} counts from 2 up; got {start} to {count}"
        )
    distance, generator = ReweightedFrechet(features, real), torch.Generator().manual_seed(seed)
    distances = []
    for n in counts:
        weights = torch.zeros(count, dtype=torch.int64)
        weights[torch.randperm(count, generator=generator)[:n]] = 1
        distances.append(distance(weights))
    return _line(counts, distances, real.feature_network)


def _line(counts: list[int], distances: list[float], feature_network: str) -> FidInfinity:
    """Fit a line by ordinary least squares."""
    y = torch.tensor(distances, dtype=torch.float64)
    inverse = 1 / torch.tensor(counts, dtype=torch.float64)
    design = torch.stack([torch.ones_like(inverse), inverse], dim=1)
    fit = torch.linalg.lstsq(design, y).solution
    left = float((y - design @ fit).square().sum())
    total = float((y - y.mean()).square().sum())
    residual = (left / (len(counts) - 2)) ** 0.5
    spread = float((inverse - inverse.mean()).square().mean())
    return FidInfinity(
        value=float(fit[0]),
        # Variance of the intercept: the residual variance times mean(x^2) / (n var(x)).
        standard_error=residual * (float(inverse.square().mean()) / spread / len(counts)) ** 0.5,
        slope=float(fit[1]),
        counts=tuple(counts),
        distances=tuple(distances),
        residual=residual,
        r_squared=1 - left / total if total > 0 else 1.0,
        feature_network=feature_network,
    )
