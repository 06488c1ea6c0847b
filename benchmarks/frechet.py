"""python benchmarks/frechet.py

The claim: the Fréchet distance of 2,048 features, 96 pictures a set, from features to number, takes a
small fraction of the time of torchmetrics' FID, and is the same number.
"""

import time

import torch
from torchmetrics.image.fid import _compute_fid

from ray_jobs.metrics.frechet import Moments, frechet_distance

DIMENSIONS = 2048
SAMPLES = 96
REPEATS = 3


def ours(one: torch.Tensor, other: torch.Tensor) -> float:
    return frechet_distance(Moments.of(one), Moments.of(other))


def rival(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.double(), other.double()
    return float(_compute_fid(one.mean(0), one.T.cov(), other.mean(0), other.T.cov()))


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(SAMPLES, DIMENSIONS, generator=generator)
    other = torch.rand(SAMPLES, DIMENSIONS, generator=generator) * 1.2 + 0.1
    seconds: dict[str, list[float]] = {"torchmetrics": [], "diffray": []}
    values = {}
    for _ in range(REPEATS):
        for name, distance in (("torchmetrics", rival), ("diffray", ours)):
            start = time.perf_counter()
            values[name] = distance(one, other)
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(times) for name, times in seconds.items()}
    for name, value in values.items():
        print(f"{name:>12}: {best[name]:8.4f} s (best of {REPEATS}), distance {value:.6f}")
    difference = abs(values["diffray"] / values["torchmetrics"] - 1)
    ratio = best["torchmetrics"] / best["diffray"]
    print(f"ratio: {ratio:.0f} times as fast, values differ by {difference:.1e}")


if __name__ == "__main__":
    main()
