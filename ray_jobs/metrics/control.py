"""How well pictures follow the control images that they were drawn for, alone and together with FID. Pure
PyTorch, in float64.

A picture's disagreement is how far the control image that is computed from it is from the one that it was
given: 0 for an equal one, 1 at most. Zhang et al. (arXiv 2302.05543) and ControlNet++ (Li et al., arXiv
2404.07987) measure ControlNets so, and FID beside it: a ControlNet that draws edges over a bad picture
agrees, and one that ignores them may still draw good ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, hypot
from typing import NamedTuple

import torch
from torch.nn.functional import max_pool1d

from ray_jobs.metrics.corrected import Correction, corrected_values, error_without, without_quarters
from ray_jobs.metrics.frechet import Moments, frechet_distance
from ray_jobs.metrics.resampling import (
    PairedDifference,
    difference_of,
    error_of_all,
    half_weights,
    replicates,
    require_pairs,
)
from ray_jobs.metrics.score import Score

DISAGREEMENT = "disagreement with the control image"
METRIC, METHOD = "control score", "control images"
SMALLEST = 1e-3  # a disagreement of the base below which shares of it say nothing
EDGE_TOLERANCE = 0.008
"""Of a picture's diagonal, rounded up: boundaries this near are the same, as in DAVIS (Perazzi et al., CVPR
2016, whose F-measure dilates boundaries by it)."""
POINT_TOLERANCE = 0.05
"""Of a picture's longer side: key points this near are the same. It is the 0.2 of a torso of PCK (Yang and
Ramanan, PAMI 35, 2013) for a person who fills the picture, with a torso of a quarter of it."""


def unlike_edges(drawn: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Return 1 - F1 of the edges of pictures, see `unmatched`: float64, N.

    Args:
        drawn, given: where the edges are: bool, N x 1 x height x width.
    """
    return unmatched(drawn, given, ceil(EDGE_TOLERANCE * hypot(*drawn.shape[-2:])))


def unlike_points(drawn: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Return 1 - F1 of the key points of pictures, see `unmatched`: float64, N.

    Args:
        drawn, given: where each key point of some person is: bool, N x K x height x width.
    """
    return unmatched(drawn, given, ceil(POINT_TOLERANCE * max(drawn.shape[-2:])))


def unlike_depth(drawn: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Return the root mean square difference of depth maps of values from 0 to 1: float64, N.

    Args:
        drawn, given: float, N x height x width.
    """
    return (drawn.double() - given.double()).square().flatten(1).mean(dim=1).sqrt()


def unmatched(drawn: torch.Tensor, given: torch.Tensor, tolerance: int) -> torch.Tensor:
    """Return 1 - F1 of marked pixels: float64, N; 0 where neither picture has any.

    Precision is the share of what is drawn that has a marked pixel of its kind among the given ones within
    the tolerance, and recall the share of what is given that has one among the drawn ones. F1 is their
    harmonic mean.

    Args:
        drawn, given: bool, N x K x height x width: pixels of K kinds, which only match their own.
        tolerance: in pixels, across and down.
    """
    ours, theirs = drawn.flatten(1).sum(dim=1).double(), given.flatten(1).sum(dim=1).double()
    precise = (drawn & _widened(given, tolerance)).flatten(1).sum(dim=1) / ours.clamp_min(1)
    recalled = (given & _widened(drawn, tolerance)).flatten(1).sum(dim=1) / theirs.clamp_min(1)
    found = 2 * precise * recalled / (precise + recalled).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(ours + theirs == 0, torch.zeros_like(found), 1 - found).cpu()


def _widened(marked: torch.Tensor, by: int) -> torch.Tensor:
    """Return pixels that have a marked one within a square: bool, N x K x height x width."""
    size, wide = 2 * by + 1, marked.float()
    for _ in range(2):  # one direction, then the other
        rows = max_pool1d(wide.flatten(0, 2), size, stride=1, padding=by)
        wide = rows.view(wide.shape).transpose(-1, -2).contiguous()
    return wide > 0


def disagreement_score(apart: torch.Tensor) -> Score:
    """Mean disagreement of pictures.

    Args:
        apart: of each: float, N.
    """
    values = apart.double()
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return Score(float(values.mean()), len(values), METHOD, error, DISAGREEMENT)


def disagreement_difference(one: torch.Tensor, other: torch.Tensor) -> PairedDifference:
    """Mean disagreement of one candidate minus that of another, on common control images and noise.

    Args:
        one, other: as for `disagreement_score`.
    """
    require_pairs(one, other)
    first, second, count = one.double(), other.double(), len(one)
    value = float((first - second).mean())
    return difference_of(value, first, second, lambda spread: spread / count**0.5, count, METHOD)


class Controlled(NamedTuple):
    """What a model draws for control images.

    Attributes:
        features: of its pictures by the network that ranks: float, N x D.
        apart: disagreement of each: float, N.
    """

    features: torch.Tensor
    apart: torch.Tensor


@dataclass(frozen=True)
class Scale:
    """What counts as 1 of either part of the control score: what the run begins from, without control images.

    Attributes:
        fid: its FID. Not the corrected one, which may be 0 for a good base: FID has the bias of the number of
            pictures, so that FID counts for less where few pictures say less about it.
        disagreement: of its pictures with the control images that it did not see.
    """

    fid: float
    disagreement: float


def control_score(
    drawn: Controlled,
    real: Moments,
    correction: Correction | None,
    scale: Scale,
    *,
    num_resamples: int,
    seed: int = 0,
) -> Score:
    """Mean of a model's corrected FID and of its disagreement, as shares of the base's; lower is better.

    Both are means or distances over the same pictures, so that a trade of one for the other shows in the sum,
    and halving the base's disagreement is worth a quarter, as is half of the base's FID. A product would fall
    to 0 with either. Without a correction FID is taken as it is.

    Errors are those of FID and disagreement of the same pictures together, from the samples of
    `corrected_score` or `frechet_score`. The scale is fixed: all candidates share it.

    Args:
        num_resamples: number of samples; 0: no error.
    """
    found = _values(drawn, real, correction, scale, num_resamples, seed)
    error = found.error_of(float(found.samples.std())) if num_resamples else None
    return Score(found.value, len(drawn.apart), real.feature_network, error, METRIC)


def control_difference(
    one: Controlled,
    other: Controlled,
    real: Moments,
    correction: Correction | None,
    scale: Scale,
    *,
    num_resamples: int,
    seed: int = 0,
) -> PairedDifference:
    """Control score of one candidate minus that of another, on common control images and noise.

    Args:
        num_resamples: number of samples, at least 2; each has the same pictures of both.
    """
    require_pairs(one.features, other.features)
    first, second = (_values(each, real, correction, scale, num_resamples, seed) for each in (one, other))
    return difference_of(
        first.value - second.value,
        first.samples,
        second.samples,
        first.error_of,
        len(one.apart),
        real.feature_network,
    )


class _Values(NamedTuple):
    """A control score, those of samples of its pictures, float64, M, and an error by the spread of these."""

    value: float
    samples: torch.Tensor
    error_of: Callable[[float], float]


def _values(
    drawn: Controlled,
    real: Moments,
    correction: Correction | None,
    scale: Scale,
    num_resamples: int,
    seed: int,
) -> _Values:
    count, apart = len(drawn.apart), drawn.apart.detach().cpu().double()
    error_of: Callable[[float], float]
    if correction is None:
        weights = half_weights(count, num_resamples, seed)
        distance = frechet_distance(Moments.of(drawn.features, real.feature_network), real)
        distances = replicates(drawn.features, real, num_resamples, seed) if num_resamples else None
        error_of = partial(error_of_all, count=count)
    else:
        weights = without_quarters(count, num_resamples, seed).weights
        distance, distances = corrected_values(drawn.features, real, correction, num_resamples, seed)
        error_of = error_without

    def together(fid: torch.Tensor, disagreement: torch.Tensor) -> torch.Tensor:
        return (fid / scale.fid + disagreement / max(scale.disagreement, SMALLEST)) / 2

    value = together(torch.tensor(distance, dtype=torch.float64), apart.mean())
    if distances is None or not num_resamples:
        return _Values(float(value), torch.zeros(0, dtype=torch.float64), error_of)
    chosen = weights.double()
    samples = together(distances, chosen @ apart / chosen.sum(dim=1))
    return _Values(float(value), samples, error_of)
