"""Several adapters as one, each with a weight: by concatenation, or of a smaller rank by their common SVD."""

from collections.abc import Sequence
from math import sqrt

import torch

from ray_jobs.weights.adapter_files import LowRank

Layers = dict[tuple[str, str], LowRank]  # by component and layer, as of `low_rank_layers`


def combined(adapters: Sequence[tuple[Layers, float]]) -> Layers:
    """Return one adapter whose update is the weighted sum of several: its rank is the sum of theirs.

    Raises:
        ValueError: one is a DoRA, whose updates do not add up.
    """
    found: dict[tuple[str, str], list[LowRank]] = {}
    for layers, weight in adapters:
        for place, own in layers.items():
            if own.magnitude is not None:
                raise ValueError(
                    f"{'.'.join(place)}: DoRA's updates depend on the base and do not add up; export one as "
                    "merged, and train or import the other on that"
                )
            up = own.up.float() * (own.scale * weight)
            found.setdefault(place, []).append(LowRank(own.down.float(), up, 1.0, None))
    return {
        place: LowRank(
            torch.cat([each.down for each in own]), torch.cat([each.up for each in own], 1), 1.0, None
        )
        for place, own in found.items()
    }


def reduced(layers: Layers, rank: int) -> tuple[Layers, float]:
    """Return the nearest adapter of a rank, and its error: the share of the update's norm that it lacks.

    The factors' triangles from QR have the singular values of their product, which is never formed.

    Args:
        layers: from `combined`.
        rank: largest of the result; layers of a smaller one stay as they are.
    """
    found, lost, whole = {}, 0.0, 0.0
    for place, own in layers.items():
        (left, over), (right, below) = (
            torch.linalg.qr(each.double()) for each in (own.up.flatten(1), own.down.flatten(1).T)
        )
        first, values, second = torch.linalg.svd(over @ below.T, full_matrices=False)
        whole += float(values.square().sum())
        if len(own.down) <= rank:
            found[place] = own
            continue
        lost += float(values[rank:].square().sum())
        roots = values[:rank].sqrt()
        up, down = left @ first[:, :rank] * roots, (right @ second[:rank].T * roots).T
        found[place] = LowRank(
            down.float().reshape(-1, *own.down.shape[1:]).contiguous(),
            up.float().reshape(len(own.up), -1, *own.up.shape[2:]).contiguous(),
            1.0,
            None,
        )
    return found, sqrt(lost / whole) if whole else 0.0
