"""Buckets have one area and lose little; a crop is centred, resized once and described as SDXL wants it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ray_jobs.config import ConfigError
from ray_jobs.data.encoding.geometry import Size, bucket_shapes, fit, nearest_bucket

MULTIPLES = st.sampled_from([8, 16, 32, 64])
SIZES = st.tuples(st.integers(1, 90), st.integers(1, 90))
reproducible = settings(derandomize=True, deadline=None, max_examples=100)


def noise(size: Size) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def kept_share(size: Size, shape: Size) -> float:
    """Of a picture's area, what its largest crop to `shape` keeps."""
    ratios = size[0] / size[1], shape[0] / shape[1]
    return min(ratios) / max(ratios)


@reproducible
@given(MULTIPLES, st.integers(1, 32), st.floats(1.05, 16))
def test_buckets_keep_to_the_multiple_the_area_and_the_aspect_ratio(
    multiple: int, multiples: int, max_aspect_ratio: float
) -> None:
    resolution = multiple * multiples
    shapes = bucket_shapes(resolution, multiple=multiple, max_aspect_ratio=max_aspect_ratio)
    for width, height in shapes:
        assert width % multiple == height % multiple == 0
        assert max(width, height) / min(width, height) <= max_aspect_ratio
        assert abs(width * height - resolution**2) <= multiple / 2 * min(width, height)
        assert abs(width * height / resolution**2 - 1) <= multiple / (2 * resolution)


@reproducible
@given(MULTIPLES, st.integers(1, 32), st.floats(1.05, 16))
def test_buckets_are_sorted_symmetric_and_different_with_the_square_in_the_middle(
    multiple: int, multiples: int, max_aspect_ratio: float
) -> None:
    resolution = multiple * multiples
    shapes = bucket_shapes(resolution, multiple=multiple, max_aspect_ratio=max_aspect_ratio)
    ratios = [width / height for width, height in shapes]
    assert all(earlier < later for earlier, later in zip(ratios, ratios[1:], strict=False))
    assert [(height, width) for width, height in reversed(shapes)] == shapes
    assert shapes[len(shapes) // 2] == (resolution, resolution)


def test_the_shapes_of_1024_pixels_in_steps_of_64() -> None:
    shapes = bucket_shapes(1024, multiple=64, max_aspect_ratio=2)
    assert shapes[4:] == [(1024, 1024), (1088, 960), (1152, 896), (1280, 832), (1344, 768)]


@pytest.mark.parametrize(
    ("resolution", "multiple", "lost"), [(64, 8, 0.17), (512, 64, 0.17), (1024, 64, 0.13), (512, 8, 0.04)]
)
def test_no_picture_within_the_range_of_aspect_ratios_loses_much(
    resolution: int, multiple: int, lost: float
) -> None:
    shapes = bucket_shapes(resolution, multiple=multiple, max_aspect_ratio=2)
    sizes = [(1000, height) for height in range(500, 2001)]
    assert min(kept_share(size, nearest_bucket(size, shapes)) for size in sizes) > 1 - lost


@reproducible
@given(SIZES)
def test_the_nearest_bucket_is_the_one_that_crops_least(size: Size) -> None:
    shapes = bucket_shapes(512, multiple=64, max_aspect_ratio=4)
    best = max(kept_share(size, shape) for shape in shapes)
    assert kept_share(size, nearest_bucket(size, shapes)) == pytest.approx(best, rel=1e-12)


def test_nearness_is_by_the_logarithm_of_the_aspect_ratio() -> None:
    shapes = [(8, 8), (16, 8)]  # halfway between them is the square root of 2, not 1.5
    assert [nearest_bucket((width, 100), shapes) for width in (140, 143)] == shapes


def test_of_two_buckets_equally_near_the_first_is_taken() -> None:
    assert nearest_bucket((10, 10), [(16, 8), (8, 16)]) == (16, 8)
    assert nearest_bucket((10, 10), [(8, 16), (16, 8)]) == (8, 16)


@pytest.mark.parametrize(("resolution", "fix"), [(100, "use 96 or 104"), (5, "use 8")])
def test_a_resolution_that_no_bucket_can_have_is_named_with_its_neighbours(resolution: int, fix: str) -> None:
    with pytest.raises(ConfigError, match=rf"data.resolution: {resolution} .* {fix}$"):
        bucket_shapes(resolution, multiple=8, max_aspect_ratio=2)


@reproducible
@given(SIZES, st.sampled_from([(16, 16), (24, 16), (16, 32), (7, 5)]))
def test_a_fitted_picture_is_the_one_that_pillow_fits(size: Size, target: Size) -> None:
    image = noise(size)
    expected = np.asarray(ImageOps.fit(image, target, Image.Resampling.LANCZOS))
    assert (fit(image, target).pixels == expected).all()


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (3, 2), (1, 1)])
def test_the_oddest_pictures_fit(size: Size) -> None:
    fitted = fit(noise(size), (24, 16))
    assert fitted.pixels.shape == (16, 24, 3) and fitted.pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("size", "target", "crop"),
    [
        ((200, 100), (50, 50), (0, 25)),  # halved to 100 x 50; 50 of the 100 are cut off, 25 at the left
        ((100, 300), (50, 50), (50, 0)),  # halved to 50 x 150; 100 of the 150 are cut off, 50 at the top
        ((100, 100), (80, 40), (20, 0)),  # to 80 x 80; 40 of the 80 are cut off, 20 at the top
        ((30, 20), (60, 60), (0, 15)),  # three times larger, 90 x 60; 15 at the left
        ((640, 480), (64, 48), (0, 0)),
    ],
)
def test_the_crop_counts_in_pixels_of_the_resized_picture(
    size: Size, target: Size, crop: tuple[int, int]
) -> None:
    fitted = fit(noise(size), target)
    assert fitted.crop == crop
    assert fitted.original_size == (size[1], size[0])
    assert fitted.target_size == (target[1], target[0]) == fitted.pixels.shape[:2]


def test_a_picture_decoded_at_a_reduced_scale_keeps_its_original_size_and_its_crop() -> None:
    whole, reduced = fit(noise((800, 400)), (50, 50)), fit(noise((200, 100)), (50, 50), original=(800, 400))
    assert reduced.original_size == whole.original_size == (400, 800)
    assert reduced.crop == whole.crop == (0, 25)
