"""Evaluation's speed and the effect of its precision: pictures, decoding, features and the score's error."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measuring import Figures, device_name, free, peak_gib, seconds_a_call, synchronise
from benchmarks.gpu.shapes import CAPTIONS, SHAPES
from ray_jobs.config import resolve_path
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.precision import PRECISIONS
from ray_jobs.diffusion.sampling import (
    Prompts,
    decode_latents,
    initial_noise,
    place,
    sample_pictures,
    seeded,
)
from ray_jobs.metrics.efficientnet import NUM_FEATURES, EfficientNet, EfficientNetLite0
from ray_jobs.metrics.feature_network import FeatureNetwork, freeze
from ray_jobs.metrics.frechet import Moments
from ray_jobs.metrics.inception import load_inception
from ray_jobs.metrics.resampling import frechet_score

INCEPTION = ".cache/inception-2015-12-05.pt"
PICTURES, STEPS = {"small": 4, "full": 64}, {"small": 2, "full": 10}
BATCH = {"small": 2, "full": 16}
GUIDANCE_SCALE = 3.0
SCORED, RESAMPLES = {"small": 64, "full": 2048}, {"small": 4, "full": 12}
FEATURES = {"small": 32, "full": 2048}
USUAL_RESAMPLES = 100


def run(size: str) -> Iterator[tuple[str, Figures]]:
    device, seeds = device_name(), range(PICTURES[size])
    network = feature_network(device)
    pipeline: Any = SHAPES[size]["SD1.5"].pipeline(device)
    place(pipeline, device)  # away
    drawn, figures = {}, {}
    for precision in ("fp32", "bf16"):  # the same weights, rounded
        pipeline.to(PRECISIONS[precision])
        free()
        draw(Prompts(pipeline, device), size, seeds[: BATCH[size]])  # what is compiled or chosen once
        begin = time.perf_counter()
        drawn[precision] = draw(Prompts(pipeline, device), size, seeds)
        figures[precision] = {
            "pictures_per_second": len(seeds) / (time.perf_counter() - begin),
            "steps": STEPS[size],
            "ms_decoding_a_picture": 1e3 * seconds_decoding(pipeline, size),
            "peak_gib": peak_gib(),
        }
    others = draw(Prompts(pipeline, device), size, range(len(seeds), 2 * len(seeds)))
    real = Moments.of(network.features(others), network.identity)
    for precision, pictures in drawn.items():
        fid = frechet_score(network.features(pictures), real)
        told = {"fid": fid.value, "fid_error": fid.standard_error}
        yield f"SD1.5, {precision}", figures[precision] | told
    # `features` copies to the host, so that a call has ended when it returns.
    seconds = seconds_a_call(lambda: network.features(pictures), warm=1, calls=2)
    yield "features", {"network": network.name, "pictures_per_second": len(pictures) / seconds}
    yield "score", score(size)


def feature_network(device: str) -> FeatureNetwork:
    """Return the network of FID; where its file is missing, another one with random weights."""
    path = Path(resolve_path(INCEPTION))
    if path.exists():
        return load_inception(path, device)
    torch.manual_seed(0)
    module = EfficientNetLite0()
    freeze(module, torch.device(device))
    return EfficientNet("efficientnet-lite0, random", "", torch.device(device), NUM_FEATURES, module)


def draw(prompts: Prompts, size: str, seeds: range) -> torch.Tensor:
    """Draw as an evaluator does: uint8, N x 3 x H x W, on the CPU.

    Args:
        prompts: of a pipeline whose autoencoder is on the device, where the others take turns.
    """
    side = SHAPES[size]["SD1.5"].side
    batches = sample_pictures(
        prompts.pipeline,
        [CAPTIONS[seed % len(CAPTIONS)] for seed in seeds],
        list(seeds),
        shapes=[(side, side)] * len(seeds),
        num_steps=STEPS[size],
        guidance_scale=GUIDANCE_SCALE,
        batch_size=BATCH[size],
        encoded=prompts,
    )
    return torch.cat(list(batches))


def seconds_decoding(pipeline: Any, size: str) -> float:
    """Return the seconds in which a batch of latents becomes pictures, per picture."""
    side = SHAPES[size]["SD1.5"].side
    shape = family_of(pipeline).codec.shape(pipeline.vae.config, side, side)
    latents = initial_noise(seeded(range(BATCH[size])), shape).to(pipeline.vae.device)
    return seconds_a_call(lambda: decode_latents(pipeline, latents), warm=1, calls=3) / BATCH[size]


def score(size: str) -> Figures:
    """Time FID with its error of so many pictures as a rung has; features are given on the device."""
    generator = torch.Generator().manual_seed(0)
    shape = (SCORED[size], FEATURES[size])
    generated, real = (torch.randn(shape, generator=generator) for _ in range(2))
    moments, there = Moments.of(real), generated.to(device_name())
    synchronise()
    seconds = {}
    for resamples in (RESAMPLES[size] // 2, RESAMPLES[size]):
        begin = time.perf_counter()
        frechet_score(there, moments, num_resamples=resamples)
        seconds[resamples] = time.perf_counter() - begin
    (few, first), (more, second) = seconds.items()
    each = max(0.0, second - first) / (more - few)
    return {
        "pictures": SCORED[size],
        "threads": torch.get_num_threads(),
        "ms_a_resample": 1e3 * each,
        f"seconds_with_{USUAL_RESAMPLES}_resamples": first + (USUAL_RESAMPLES - few) * each,
    }
