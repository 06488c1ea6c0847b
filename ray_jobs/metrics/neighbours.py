"""Nearest neighbours of feature vectors: precision and recall. Pure PyTorch, in float64."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Maximum number of distances in memory: 128 MiB.
MAX_DISTANCES = 1 << 24


def _distances(queries: torch.Tensor, references: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """Yield Euclidean distances of chunks of the queries to all references: float64, chunk x M."""
    references = references.double()
    for part in queries.split(max(1, limit // len(references))):
        yield torch.cdist(part.double(), references)


def nearest(
    queries: torch.Tensor, references: torch.Tensor, k: int = 1, *, limit: int = MAX_DISTANCES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k nearest references of each query by Euclidean distance.

    Args:
        queries, references: float, N x D and M x D.
        limit: maximum number of distances in memory, at least M.

    Returns:
        Distances (float64) and indices (int64), N x k each, the nearest first.
    """
    found = [part.topk(k, largest=False) for part in _distances(queries, references, limit)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall, each from 0 to 1. They depend on the counts and k: compare only with equal ones.

    Attributes:
        precision: share of generated pictures within the real manifold, a measure of quality.
        recall: share of real pictures within the generated manifold, a measure of variety.
    """

    precision: float
    recall: float
    k: int
    num_samples: int
    num_real: int
    feature_network: str


def precision_recall(
    generated: torch.Tensor,
    real: torch.Tensor,
    feature_network: str,
    *,
    k: int = 3,
    limit: int = MAX_DISTANCES,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, equations 1 to 3).

    A set's manifold is the union of balls around its pictures; each radius is the distance to the k-th
    nearest other picture of the set.

    Args:
        generated, real: features, float, N x D and M x D; more than k of each.
        k: number of neighbours; 3 in the paper.

    Raises:
        ValueError: a set is too small for k.
    """
    if k < 1 or min(len(generated), len(real)) <= k:
        raise ValueError(f"k: from 1 to one less than the pictures of either set; got {k}")
    precision = _share_inside(generated, real, k, limit)
    recall = _share_inside(real, generated, k, limit)
    return PrecisionRecall(precision, recall, k, len(generated), len(real), feature_network)


def _share_inside(queries: torch.Tensor, manifold: torch.Tensor, k: int, limit: int) -> float:
    """Share of the queries inside a ball of the manifold."""
    # Each picture is its own nearest neighbour, so the k-th other one is the last of k + 1.
    radii = nearest(manifold, manifold, k + 1, limit=limit)[0][:, k]
    inside = [(part <= radii).any(dim=1) for part in _distances(queries, manifold, limit)]
    return float(torch.cat(inside).double().mean())


def share_error(share: float, count: int) -> float:
    """Standard error of a share of `count` pictures under resampling, with the reference set fixed.

    It uses the plus-four rule (Agresti & Coull, 1998), so that a share of 0 or 1 among few pictures does not
    get an error of zero.
    """
    adjusted = (share * count + 2) / (count + 4)
    return float((adjusted * (1 - adjusted) / (count + 4)) ** 0.5)
