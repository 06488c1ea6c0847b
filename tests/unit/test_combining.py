"""Several adapters as one: exactly their weighted sum, or the nearest of a rank with its error."""

import pytest
import torch

from ray_jobs.weights.adapter_files import LowRank
from ray_jobs.weights.combining import Layers, combined, reduced
from ray_jobs.weights.merging import merged_weight

LINEAR, CONVOLUTION = ("unet", "to_q"), ("unet", "conv1")
SIZES = {LINEAR: (12, 10), CONVOLUTION: (12, 5, 3, 3)}


def adapter(rank: int, scale: float, places: tuple[tuple[str, str], ...] = (LINEAR, CONVOLUTION)) -> Layers:
    found = {}
    for place in places:
        out, *inside = SIZES[place]
        ones = [1] * (len(inside) - 1)
        found[place] = LowRank(torch.randn(rank, *inside), torch.randn(out, rank, *ones), scale, None)
    return found


def update(layers: Layers, place: tuple[str, str]) -> torch.Tensor:
    return merged_weight(torch.zeros(SIZES[place]), layers[place])


def test_the_sum_is_exact_and_has_the_sum_of_the_ranks() -> None:
    torch.manual_seed(0)
    first, second = adapter(2, 0.5), adapter(3, 2.0, (LINEAR,))
    both = combined([(first, 0.7), (second, -0.3)])
    expected = 0.7 * update(first, LINEAR) - 0.3 * update(second, LINEAR)
    assert torch.allclose(update(both, LINEAR), expected, atol=1e-5)
    assert torch.allclose(update(both, CONVOLUTION), 0.7 * update(first, CONVOLUTION), atol=1e-5)
    assert [len(both[place].down) for place in (LINEAR, CONVOLUTION)] == [5, 2]


def test_a_smaller_rank_is_the_nearest_and_tells_what_it_lacks() -> None:
    torch.manual_seed(0)
    both = combined([(adapter(3, 1.0), 1.0), (adapter(3, 1.0), 1.0)])
    small, error = reduced(both, 4)
    lacking = whole = 0.0
    for place in SIZES:
        full = update(both, place)
        left, values, right = torch.linalg.svd(full.flatten(1), full_matrices=False)
        nearest = (left[:, :4] * values[:4]) @ right[:4]
        assert torch.allclose(update(small, place).flatten(1), nearest, atol=1e-4)
        assert len(small[place].down) == 4
        lacking += float((full.flatten(1) - nearest).square().sum())
        whole += float(full.square().sum())
    assert error == pytest.approx((lacking / whole) ** 0.5, rel=1e-4) and error > 0.05
    same, none = reduced(both, 6)
    assert none == 0.0 and all(same[place] is both[place] for place in SIZES)


def test_dora_does_not_add_up() -> None:
    layers = {LINEAR: adapter(2, 1.0)[LINEAR]._replace(magnitude=torch.ones(12))}
    with pytest.raises(ValueError, match=r"^unet\.to_q: DoRA's updates depend on the base and do not add up"):
        combined([(layers, 1.0)])
