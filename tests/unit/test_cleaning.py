"""What is measured of a picture tells flat, dark, bright and blurred ones, and copies from others."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from ray_jobs.config import CleaningConfig
from ray_jobs.data.curation.cleaning import (
    FIRST_LOOK_SIDE,
    QUALITY_CHECKS,
    check,
    check_size,
    histogram,
    measure,
)
from ray_jobs.pictures.reading import Picture, Rejected, read_picture

EMOJI = Path(__file__).parents[2] / "examples" / "fluent-emoji"


def picture(image: Image.Image) -> Picture:
    return Picture(image, image.width, image.height)


def scene(seed: int, side: int = 256) -> Image.Image:
    """Noise whose amplitude falls with its frequency, as in photographs."""
    generator = np.random.default_rng(seed)
    layers = np.zeros((side, side, 3))
    for octave in range(1, 8):
        noise = generator.normal(size=(3, 2**octave, 2**octave)).astype(np.float32) * 0.6**octave
        bands = [Image.fromarray(band).resize((side, side), Image.Resampling.BICUBIC) for band in noise]
        layers += np.stack([np.asarray(band) for band in bands], axis=-1)
    low, high = layers.min(), layers.max()
    return Image.fromarray(((layers - low) / (high - low) * 255).astype(np.uint8))


def emoji(name: str) -> Image.Image:
    data = (EMOJI / "images" / f"{name}.webp").read_bytes()
    return read_picture(data, background="white", max_pixels=1_000_000).image


def recompressed(image: Image.Image, quality: int = 60) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def halved(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def brightened(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1.05)


def distance(one: Image.Image, other: Image.Image) -> int:
    return (measure(picture(one)).hash ^ measure(picture(other)).hash).bit_count()


def colour_difference(one: Image.Image, other: Image.Image) -> float:
    """The mean of the differences of the fields' colours, of the full range."""
    fields = [np.frombuffer(measure(picture(image)).colours, np.uint8).astype(int) for image in (one, other)]
    return float(np.abs(fields[0] - fields[1]).mean() / 255)


def test_blur_lowers_sharpness_and_the_more_the_stronger() -> None:
    blurred = [emoji("abacus").filter(ImageFilter.GaussianBlur(radius)) for radius in (0, 1, 2, 4)]
    sharpness = [measure(picture(image)).sharpness for image in blurred]
    assert all(later < earlier / 2 for earlier, later in zip(sharpness, sharpness[1:], strict=False))


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    point = np.zeros((5, 5, 3), np.uint8)
    point[2, 2] = 100
    laplacian = np.array([-400.0] + [100.0] * 4 + [0.0] * 20)
    assert measure(picture(Image.fromarray(point))).sharpness == pytest.approx(laplacian.var())


def test_sharpness_of_a_large_picture_is_that_of_its_reduced_copy() -> None:
    large = scene(1, side=1024)
    small = large.resize((256, 256), Image.Resampling.BICUBIC)
    expected = measure(picture(small)).sharpness
    assert measure(picture(large)).sharpness == pytest.approx(expected, rel=0.05)


def test_a_small_crisp_picture_is_not_called_blurred() -> None:
    checks = Image.fromarray(np.indices((64, 64)).sum(0).astype(np.uint8) // 4 % 2 * 200).convert("RGB")
    enlarged = checks.resize((256, 256), Image.Resampling.BICUBIC)
    small = measure(picture(checks)).sharpness
    assert small > 5 * measure(picture(enlarged)).sharpness


def test_contrast_and_the_shares_of_dark_and_bright_are_those_of_the_luma() -> None:
    pixels = np.full((100, 100, 3), 128, np.uint8)
    pixels[:10] = 7
    pixels[10:20] = 8
    pixels[20:50] = 248
    pixels[50:60] = 247
    measures = measure(picture(Image.fromarray(pixels)))
    assert measures.dark == pytest.approx(0.1)
    assert measures.bright == pytest.approx(0.3)
    assert measures.contrast == pytest.approx(pixels.std(), rel=1e-5)
    green = measure(picture(Image.new("RGB", (9, 9), (0, 13, 0))))
    assert green.dark == 0 < measure(picture(Image.new("RGB", (9, 9), (0, 0, 13)))).dark  # by luma


def test_a_first_look_measures_nearly_as_the_whole_picture() -> None:
    buffer = io.BytesIO()
    scene(2, side=2048).save(buffer, format="JPEG", quality=90)
    data = buffer.getvalue()
    whole = measure(read_picture(data, background="white", max_pixels=10_000_000))
    decoded = read_picture(data, background="white", max_pixels=10_000_000, at_least=FIRST_LOOK_SIDE)
    first = measure(decoded)
    assert decoded.image.size == (512, 512) and (first.width, first.height) == (2048, 2048)
    assert first.sharpness == pytest.approx(whole.sharpness, rel=0.1)
    assert first.contrast == pytest.approx(whole.contrast, rel=0.01)
    assert (first.hash ^ whole.hash).bit_count() <= 2


@pytest.mark.parametrize("change", [recompressed, halved, brightened])
def test_copies_stay_within_four_bits_and_close_in_colour(
    change: Callable[[Image.Image], Image.Image],
) -> None:
    names = [json.loads(line)["file_name"] for line in (EMOJI / "metadata.jsonl").read_text().splitlines()]
    pictures = [emoji(Path(name).stem) for name in names[::12]] + [scene(seed) for seed in range(30)]
    assert len(pictures) > 80
    found = sum(
        distance(each, change(each)) <= 4 and colour_difference(each, change(each)) < 0.04
        for each in pictures
    )
    assert found / len(pictures) > 0.97


def test_different_scenes_are_far_apart() -> None:
    hashes = [measure(picture(scene(seed))).hash for seed in range(40)]
    distances = [(a ^ b).bit_count() for place, a in enumerate(hashes) for b in hashes[:place]]
    assert min(distances) > 8
    assert np.mean(distances) == pytest.approx(32, abs=1)


def test_a_shape_in_another_colour_has_the_hash_but_not_the_colours() -> None:
    orange, green = emoji("orange-heart"), emoji("green-heart")
    assert distance(orange, green) <= 4 and colour_difference(orange, green) > 0.1
    hearts = [Image.new("RGB", (128, 128), "white") for _ in range(2)]
    for heart, fill in zip(hearts, [(200, 0, 0), (0, 102, 0)], strict=True):  # of the same luma
        ImageDraw.Draw(heart).polygon([(20, 20), (110, 40), (60, 115)], fill=fill)
    assert distance(*hearts) <= 4 and colour_difference(*hearts) > 0.04


def test_the_hash_has_64_bits_and_that_of_a_flat_picture_has_none_set() -> None:
    assert {measure(picture(Image.new("RGB", (50, 40), (g, g, g)))).hash for g in range(0, 256, 15)} == {0}
    assert 1 << 48 < max(measure(picture(scene(seed))).hash for seed in range(9)) < 1 << 64


def test_colours_are_the_means_of_four_by_four_fields_row_by_row() -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:10, 20:40] = (10, 20, 30)
    colours = measure(picture(Image.fromarray(pixels))).colours
    assert len(colours) == 48 and colours[3:6] == bytes([10, 20, 30]) and not any(colours[6:])


def reason(image: Image.Image, **thresholds: float) -> tuple[str, str]:
    config = CleaningConfig.model_validate(thresholds)
    with pytest.raises(Rejected) as caught:
        check_size(*image.size, config)
        check(measure(picture(image)), config)
    return caught.value.reason, caught.value.detail


def test_a_rejected_picture_tells_the_number_and_the_threshold() -> None:
    spots = Image.new("RGB", (100, 100), "black")
    spots.paste("white", (0, 0, 10, 5))
    inverse = Image.eval(spots, lambda value: 255 - value)
    soft = scene(3).filter(ImageFilter.GaussianBlur(8))
    sharpness = f"{measure(picture(soft)).sharpness:.4g}"
    field = "data.cleaning."
    assert reason(spots) == ("too_dark", f"dark 0.995 is above {field}max_dark 0.99")
    assert reason(inverse) == ("too_bright", f"bright 0.995 is above {field}max_bright 0.99")
    for flat in ("grey", "black", "white"):
        image = Image.new("RGB", (64, 64), flat)
        expected = ("near_constant", f"contrast 0 is below {field}min_contrast 2")
        assert reason(image) == reason(image, min_sharpness=10) == expected
    assert reason(soft, min_sharpness=10) == (
        "blurred",
        f"sharpness {sharpness} is below {field}min_sharpness 10",
    )


def test_sizes_are_judged_by_the_shorter_side_and_the_ratio() -> None:
    small = ("too_small", "shorter side 31 is below data.cleaning.min_side 32")
    assert reason(Image.new("RGB", (31, 40))) == reason(Image.new("RGB", (40, 31))) == small
    long = ("extreme_aspect_ratio", "aspect ratio 4.1 is above data.cleaning.max_aspect_ratio 4")
    assert reason(Image.new("RGB", (410, 100))) == reason(Image.new("RGB", (100, 410))) == long
    check_size(128, 32, CleaningConfig())
    first_look = Picture(Image.new("RGB", (16, 16)), width=128, height=128)
    check_size(first_look.width, first_look.height, CleaningConfig())


def test_a_good_picture_passes_and_an_empty_threshold_is_off() -> None:
    check(measure(picture(scene(4))), CleaningConfig(min_sharpness=1))
    measures = measure(picture(scene(4)))
    check(measures, CleaningConfig(min_contrast=measures.contrast))  # the threshold itself is allowed
    flat = measure(picture(Image.new("RGB", (64, 64), "white")))
    check(flat, CleaningConfig(min_contrast=None, max_bright=None))


@pytest.mark.parametrize("name", QUALITY_CHECKS)
def test_histograms_of_parts_add_up_and_leave_nothing_out(name: str) -> None:
    edges = QUALITY_CHECKS[name].edges
    assert len(edges) == 25 and (np.diff(edges) > 0).all()
    values = np.concatenate([[0.0, 1e9], edges, np.random.default_rng(0).uniform(0, 2, 100)])
    counts = histogram(name, values)
    assert counts.dtype == np.int64 and counts.sum() == len(values) and counts[-1] >= 1
    assert (histogram(name, values[:40]) + histogram(name, values[40:]) == counts).all()
    assert histogram(name, edges[3:4]).tolist().index(1) == 3
    assert QUALITY_CHECKS[name].field in CleaningConfig.model_fields
