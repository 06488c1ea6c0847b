"""An augmentation does what it is named for and nothing else, as often as asked, alike for the same row."""

import hashlib
from dataclasses import astuple, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_jobs.config import AugmentationConfig
from ray_jobs.data.encoding.augmentation import Changes, apply, augment, row_generator
from ray_jobs.data.encoding.geometry import Size, fit

DIGEST = hashlib.sha256(b"picture").hexdigest()
EVERYTHING = AugmentationConfig(flip=0.5, rotate=0.5, crop=0.5, scale=0.5, colour=0.5)
ALWAYS = EVERYTHING.model_copy(update=dict.fromkeys(("flip", "rotate", "crop", "scale", "colour"), 1.0))
SIZES = st.tuples(st.integers(1, 90), st.integers(1, 90))
PLACES = st.tuples(st.floats(0, 1), st.floats(0, 1))
reproducible = settings(derandomize=True, deadline=None, max_examples=100)


def noise(size: Size) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def numbers(changes: Changes) -> list[float]:
    """Every strength: degrees, side, place from left and top, brightness, contrast, saturation, hue."""
    _, degrees, side, place, *colours = astuple(changes)
    return [degrees, side, *place, *colours]


def slope(size: Size) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=2).astype(np.uint8))


@reproducible
@given(SIZES, st.sampled_from([(16, 16), (24, 16), (7, 5)]), st.integers(0, 5))
def test_with_nothing_switched_on_a_picture_is_fitted(size: Size, target: Size, draw: int) -> None:
    image = noise(size)
    plain = fit(image, target)
    augmented = augment(image, target, AugmentationConfig(), row_generator(0, DIGEST, draw))
    assert (augmented.pixels == plain.pixels).all()
    assert replace(augmented, pixels=plain.pixels) == plain


def test_the_same_row_is_augmented_alike_and_another_seed_picture_or_draw_is_not() -> None:
    def pixels(seed: int, digest: str, draw: int) -> bytes:
        generator = row_generator(seed, digest, draw)
        return augment(noise((48, 32)), (16, 16), EVERYTHING, generator).pixels.tobytes()

    other = hashlib.sha256(b"another").hexdigest()
    rows = [(0, DIGEST, 0), (-1, DIGEST, 0), (0, other, 0), (0, DIGEST, 1)]
    assert pixels(*rows[0]) == pixels(*rows[0])
    assert len({pixels(*row) for row in rows}) == 4


def test_a_row_draws_the_numbers_that_it_always_drew() -> None:
    assert row_generator(7, DIGEST, 3).random(2).tolist() == [0.4206990492788807, 0.0941775019931842]


@pytest.mark.parametrize("name", ["flip", "rotate", "crop", "scale", "colour"])
def test_switching_one_augmentation_off_leaves_the_others_as_they_were(name: str) -> None:
    own = {
        "flip": {"flip"},
        "rotate": {"degrees"},
        "crop": {"place"},
        "scale": {"side"},
        "colour": {"brightness", "contrast", "saturation", "hue"},
    }
    without = EVERYTHING.model_copy(update={name: 0.0})
    changed = set()
    for draw in range(50):
        generators = row_generator(0, DIGEST, draw), row_generator(0, DIGEST, draw)
        before, after = Changes.draw(EVERYTHING, generators[0]), Changes.draw(without, generators[1])
        changed |= {
            field.name
            for field in fields(Changes)
            if getattr(before, field.name) != getattr(after, field.name)
        }
        assert generators[0].random() == generators[1].random()
    assert changed == own[name]


def test_each_augmentation_comes_as_often_as_its_probability() -> None:
    config = AugmentationConfig(flip=0.5, rotate=0.3, crop=0.7, scale=0.2, colour=0.9)
    count = 2000
    drawn = [Changes.draw(config, row_generator(0, DIGEST, draw)) for draw in range(count)]
    came = {
        config.flip: [each.flip for each in drawn],
        config.rotate: [each.degrees != 0 for each in drawn],
        config.crop: [each.place != (0.5, 0.5) for each in drawn],
        config.scale: [each.side != 1 for each in drawn],
        config.colour: [each.hue != 0 for each in drawn],
    }
    for probability, times in came.items():
        sigma = (count * probability * (1 - probability)) ** 0.5
        assert abs(sum(times) - count * probability) < 3 * sigma


def test_strengths_fill_the_range_between_their_limits() -> None:
    config = ALWAYS.model_copy(update={"max_degrees": 20, "min_scale": 0.6, "max_hue": 0.1})
    drawn = [Changes.draw(config, row_generator(0, DIGEST, draw)) for draw in range(2000)]
    limits = [(-20, 20), (0.6, 1), (0, 1), (0, 1), *[(0.9, 1.1)] * 3, (-0.1, 0.1)]
    for (low, high), strengths in zip(limits, np.array([numbers(each) for each in drawn]).T, strict=True):
        assert low <= strengths.min() and strengths.max() <= high
        counts, _ = np.histogram(strengths, bins=4, range=(low, high))
        assert abs(counts - 500).max() < 80  # four standard deviations


def test_what_is_drawn_is_independent() -> None:
    drawn = [Changes.draw(ALWAYS, row_generator(0, DIGEST, draw)) for draw in range(2000)]
    strengths = np.array([numbers(each) for each in drawn]).T
    drawn = [Changes.draw(EVERYTHING, row_generator(0, DIGEST, draw)) for draw in range(2000)]
    came = np.array([(e.flip, e.degrees != 0, e.place[0] != 0.5, e.side != 1, e.hue != 0) for e in drawn]).T
    for samples in (strengths, came.astype(float)):
        correlations = np.corrcoef(samples) - np.eye(len(samples))
        assert abs(correlations).max() < 4 / 2000**0.5


def test_a_flipped_picture_is_the_mirrored_one_and_its_crop_counts_from_the_new_left() -> None:
    image = noise((120, 40))
    plain = apply(image, (20, 20), Changes(place=(0.25, 0.5)))
    flipped = apply(image, (20, 20), Changes(flip=True, place=(0.75, 0.5)))
    assert (flipped.pixels == plain.pixels[:, ::-1]).all()
    assert (plain.crop, flipped.crop) == ((0, 10), (0, 30))  # of 60 x 20


@reproducible
@given(
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.sampled_from([(16, 16), (24, 16), (5, 15)]),
    st.floats(-45, 45),
    st.floats(0.1, 1),
    PLACES,
)
def test_a_rotated_picture_shows_nothing_from_outside_itself(
    size: Size, target: Size, degrees: float, side: float, place: tuple[float, float]
) -> None:
    changes = Changes(degrees=degrees, side=side, place=place)
    assert (apply(Image.new("RGB", size, "white"), target, changes).pixels == 255).all()


@pytest.mark.parametrize("degrees", [-45, -20, 10, 33])
@pytest.mark.parametrize("size", [(100, 60), (60, 100), (80, 80)])
def test_a_rotated_crop_reaches_the_edge_of_the_picture(size: Size, degrees: float) -> None:
    """The largest centred crop touches the edge with two opposite corners at least: there the rim shows."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (2, 2, size[0] - 2, size[1] - 2))
    red = apply(image, (60, 60), Changes(degrees=degrees)).pixels[..., 0]
    corners = [red[:4, :4].max(), red[:4, -4:].max(), red[-4:, -4:].max(), red[-4:, :4].max()]
    assert min(corners[::2]) > 60 or min(corners[1::2]) > 60
    assert red[10:-10, 10:-10].max() == 0


@reproducible
@given(st.integers(-45, 45).filter(bool), st.floats(0.4, 1), PLACES)
def test_a_rotated_crop_lies_where_its_offset_says_in_the_turned_picture(
    degrees: int, side: float, place: tuple[float, float]
) -> None:
    image, target = slope((90, 60)), (30, 20)
    fitted = apply(image, target, Changes(degrees=degrees, side=side, place=place))
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    radians = np.radians(abs(degrees))
    cos, sin = np.cos(radians), np.sin(radians)
    # Pixels of the picture that make one of the crop.
    scale = side * min(90 / (30 * cos + 20 * sin), 60 / (30 * sin + 20 * cos))
    top, left = (offset * scale for offset in fitted.crop)
    expected = turned.resize(target, box=(left, top, left + 30 * scale, top + 20 * scale))
    inner = np.s_[3:-3, 3:-3]
    assert abs(fitted.pixels[inner].astype(int) - np.asarray(expected)[inner]).max() < 12


def test_the_crop_of_a_turned_square_counts_from_the_corner_of_the_rectangle_around_it() -> None:
    # By 45 degrees: the rectangle around has sides of sqrt(2), the crop of 1 / sqrt(2), half as long.
    assert apply(noise((64, 64)), (32, 32), Changes(degrees=45)).crop == (16, 16)


def test_a_smaller_crop_shows_less_at_a_larger_scale() -> None:
    image = noise((64, 64))
    fitted = apply(image, (32, 32), Changes(side=0.5))
    assert (fitted.pixels == np.asarray(image)[16:48, 16:48]).all()
    assert (fitted.crop, fitted.original_size) == ((16, 16), (64, 64))


@pytest.mark.parametrize(("place", "left"), [(0.0, 0), (0.25, 8), (1.0, 32)])
def test_a_crop_lies_between_the_ends_of_where_it_fits(place: float, left: int) -> None:
    image = noise((64, 32))
    fitted = apply(image, (32, 32), Changes(place=(place, 0.9)))
    assert (fitted.pixels == np.asarray(image)[:, left : left + 32]).all()
    assert fitted.crop == (0, left)


@reproducible
@given(SIZES, st.floats(0.01, 1), PLACES)
def test_a_crop_of_any_side_at_any_place_stays_within_the_picture(
    size: Size, side: float, place: tuple[float, float]
) -> None:
    top, left = apply(Image.new("RGB", size), (16, 16), Changes(side=side, place=place)).crop
    scale = 16 / (side * min(size))
    assert 0 <= left <= scale * size[0] - 16 + 0.5
    assert 0 <= top <= scale * size[1] - 16 + 0.5


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        (Changes(brightness=1.5), (100, 60, 20), (150, 90, 30)),
        (Changes(brightness=0.5), (100, 60, 20), (50, 30, 10)),
        (Changes(saturation=0.0), (200, 0, 0), (60, 60, 60)),  # the luma: 0.299 of red
        (Changes(saturation=0.5), (200, 0, 0), (130, 30, 30)),
        (Changes(hue=1 / 3), (255, 0, 0), (0, 255, 0)),
        (Changes(hue=-1 / 3), (255, 0, 0), (0, 0, 255)),
        (Changes(hue=0.5), (0, 255, 255), (255, 0, 0)),
        (Changes(hue=0.4), (90, 90, 90), (90, 90, 90)),
        (Changes(hue=0.001), (13, 77, 201), (13, 77, 201)),  # no step of the hue, so no way through HSV
    ],
)
def test_a_colour_changes_by_its_definition(
    changes: Changes, before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    pixels = apply(Image.new("RGB", (8, 8), before), (8, 8), changes).pixels
    assert abs(pixels.astype(int) - after).max() <= 5


def test_contrast_moves_every_pixel_from_the_mean_luma() -> None:
    image = Image.new("RGB", (8, 8), (50, 50, 50))
    image.paste((150, 150, 150), (0, 0, 4, 8))
    lower = apply(image, (8, 8), Changes(contrast=0.5)).pixels
    higher = apply(image, (8, 8), Changes(contrast=1.5)).pixels
    assert (lower[0, 0, 0], lower[0, -1, 0]) == (125, 75)
    assert (higher[0, 0, 0], higher[0, -1, 0]) == (175, 25)


def test_colours_change_without_moving_anything_and_geometry_without_changing_colours() -> None:
    colours = Changes(brightness=1.2, contrast=0.9, saturation=1.1, hue=0.05)
    moved = apply(noise((60, 40)), (20, 20), colours)
    assert moved.crop == fit(noise((60, 40)), (20, 20)).crop
    plain = Image.new("RGB", (60, 40), (13, 77, 201))
    turned = Changes(flip=True, degrees=20, side=0.8, place=(0.1, 0.9))
    assert (apply(plain, (20, 20), turned).pixels == (13, 77, 201)).all()


def test_an_augmented_picture_decoded_at_a_reduced_scale_keeps_its_original_size() -> None:
    fitted = augment(noise((60, 40)), (20, 20), EVERYTHING, row_generator(0, DIGEST, 0), original=(480, 320))
    assert (fitted.original_size, fitted.target_size) == ((320, 480), (20, 20))
