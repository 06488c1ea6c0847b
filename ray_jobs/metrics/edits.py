"""How near edits come to the pictures that they should be. Pure PyTorch, in float64.

In features of the network that ranks, as CLIP-I and DINO are taken between an edit and its target (Zhang et
al., MagicBrush, arXiv 2306.10012, section 4.2), turned around so that less is better.
"""

import torch
from torch.nn.functional import normalize

from ray_jobs.metrics.resampling import PairedDifference, difference_of, require_pairs
from ray_jobs.metrics.score import Score

METRIC = "distance to the target"
OUTSIDE = "change outside of the edit"
ALIKE = 8  # levels of 255: pixels of a reference and its target that differ by no more were not to be edited
FEWEST = 0.01  # share of an image's pixels that say something


def target_distance(drawn: torch.Tensor, targets: torch.Tensor, feature_network: str) -> Score:
    """Mean of 1 - cosine of each picture to its target: 0 at best, 2 at most.

    Args:
        drawn: features: float, N x D.
        targets: features: float, M x D; that of drawn picture i is target i modulo M.
    """
    distances = _distances(drawn, targets)
    error = float(distances.std() / len(distances) ** 0.5) if len(distances) > 1 else None
    return Score(float(distances.mean()), len(distances), feature_network, error, METRIC)


def target_difference(
    one: torch.Tensor, other: torch.Tensor, targets: torch.Tensor, feature_network: str
) -> PairedDifference:
    """Distance of one candidate minus that of another, from the same references, instructions and noise.

    Args:
        one, other, targets: as in `target_distance`.
    """
    require_pairs(one, other)
    first, second = _distances(one, targets), _distances(other, targets)
    count = len(one)
    return difference_of(
        float((first - second).mean()),
        first,
        second,
        lambda deviation: deviation / count**0.5,
        count,
        feature_network,
    )


def over_unedited(
    drawn: torch.Tensor, before: torch.Tensor, targets: torch.Tensor, feature_network: str
) -> PairedDifference:
    """Distance of edits to their targets minus that of the pictures as they were, in pairs.

    Args:
        drawn, targets: as in `target_distance`.
        before: features of the first references: float, M x D.
    """
    repeated = before[torch.arange(len(drawn)) % len(before)]
    return target_difference(drawn, repeated, targets, feature_network)


def outside_change(drawn: torch.Tensor, reference: torch.Tensor, target: torch.Tensor) -> float:
    """Mean difference of an edit from its target, in levels of 255, where the target is as the reference.

    Args:
        drawn, reference, target: uint8, 3 x height x width.

    Returns:
        A value that is no number where the reference has another size, or nothing was to be left alone.
    """
    if reference.shape != target.shape:
        return float("nan")
    ours, before, after = (each.int() for each in (drawn, reference, target))
    untouched = (before - after).abs().amax(dim=0) <= ALIKE
    if float(untouched.float().mean()) < FEWEST:
        return float("nan")
    return float((ours - after).abs().float().mean(dim=0)[untouched].mean())


def outside_score(changes: torch.Tensor, num_samples: int) -> Score | None:
    """Mean of `outside_change` over the pictures that have one; None if none has.

    Args:
        changes: float, N.
    """
    found = changes.double()[changes.isfinite()]
    if not len(found):
        return None
    error = float(found.std() / len(found) ** 0.5) if len(found) > 1 else None
    return Score(float(found.mean()), num_samples, "pixels", error, OUTSIDE)


def _distances(drawn: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the distance of each picture to its target: float64, N."""
    ours, theirs = (normalize(each.detach().cpu().double(), dim=1) for each in (drawn, targets))
    return 1 - (ours * theirs[torch.arange(len(ours)) % len(theirs)]).sum(dim=1)
