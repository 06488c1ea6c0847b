"""Crop shapes of pictures, checked against the model."""

from typing import TYPE_CHECKING

from cluster.fetched import local_path
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.encoding.geometry import Size, bucket_shapes, nearest_bucket
from ray_jobs.weights.model_files import family_in, latent_shapes, max_area, max_side, size_multiple

if TYPE_CHECKING:
    from ray_jobs.diffusion.families import Family
    from ray_jobs.diffusion.families.text import Text


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


def painter(config: Config) -> "Family | None":
    """Return the model's family if it paints into the masks of the rows, else None."""
    if not config.data.has_masks:
        return None
    family = family_in(local_path(config.model.base), revision=config.model.revision)
    return family if family.paints_masks else None


def reference_sizes(config: Config) -> dict[Size, Size] | None:
    """Return the shape of the reference pictures of each shape of pictures; None without references.

    Raises:
        ConfigError: as for `picture_shapes`.
    """
    data = config.data
    if not data.num_references:
        return None
    shapes = picture_shapes(config)
    if not data.reference_resolution:
        return {shape: shape for shape in shapes}
    smaller = data.model_copy(update={"resolution": data.reference_resolution})
    try:
        others = picture_shapes(config.model_copy(update={"data": smaller}))
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.resolution", "data.reference_resolution")) from None
    return {shape: nearest_bucket(shape, others) for shape in shapes}


def square_latents(config: Config) -> tuple[int, ...]:
    """Return the shape of a square picture's latents as the denoiser receives them, C x ..."""
    return _square_latents(config, config.data.resolution)


def square_references(config: Config) -> list[tuple[int, ...]]:
    """Return the shapes of the latents of a square picture's references, each C x ..."""
    data = config.data
    shape = _square_latents(config, data.reference_resolution or data.resolution)
    return [shape] * data.num_references


def shown_tokens(config: Config, text: "Text") -> int:
    """Return how many tokens of a caption stand for a square picture's references; 0 if none are seen."""
    side = config.data.reference_resolution or config.data.resolution
    return text.shown_tokens([(side, side)] * config.data.num_references)


def _square_latents(config: Config, side: int) -> tuple[int, ...]:
    model = config.model
    [shape] = latent_shapes(local_path(model.base), [(side, side)], revision=model.revision)
    return shape
