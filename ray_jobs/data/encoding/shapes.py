"""Crop shapes of pictures, checked against the model."""

from cluster.fetched import local_path
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.encoding.geometry import Size, bucket_shapes
from ray_jobs.weights.model_files import latent_shapes, max_area, max_side, size_multiple


def picture_shapes(config: Config) -> list[Size]:
    """Crop shapes of pictures: one square, or the aspect-ratio buckets.

    Raises:
        ConfigError: the resolution does not fit the model.
    """
    data, model = config.data, config.model
    base = local_path(model.base)
    multiple = size_multiple(base, revision=model.revision)
    if data.resolution % multiple:
        raise ConfigError(
            f"data.resolution: {data.resolution} is not a multiple of {multiple}, as {model.base} needs; "
            f"use {max(1, round(data.resolution / multiple)) * multiple}"
        )
    shapes = [(data.resolution, data.resolution)]
    if data.buckets:
        longest = data.bucket_max_aspect_ratio
        shapes = bucket_shapes(data.resolution, multiple=multiple, max_aspect_ratio=longest)
    limit, side = max_side(base, revision=model.revision), max(max(shape) for shape in shapes)
    if limit is not None and side > limit:
        field = "data.resolution" if data.resolution > limit else "data.bucket_max_aspect_ratio"
        raise ConfigError(
            f"{field}: sides of up to {side} pixels, but {model.base} supports at most {limit}; lower it"
        )
    area = max_area(base, revision=model.revision)
    if area and any(width != height and width * height > area for width, height in shapes):
        raise ConfigError(
            f"data.resolution: {model.base} supports at most {area:,} pixels in images that are not square; "
            "lower it, or turn off data.buckets"
        )
    return shapes


def square_latents(config: Config) -> tuple[int, ...]:
    """Return the shape of a square picture's latents as the denoiser receives them, C x ..."""
    side, model = config.data.resolution, config.model
    [shape] = latent_shapes(local_path(model.base), [(side, side)], revision=model.revision)
    return shape
