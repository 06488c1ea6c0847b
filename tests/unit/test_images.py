"""Pictures of every usual format arrive upright, in sRGB, 8 bits a channel; broken ones with a reason."""

import io
import struct
import tracemalloc
import warnings
import zlib
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms, ImageOps

from ray_jobs.pictures.reading import Picture, Rejected, decode_image, encode_png, read_picture

pillow_heif.register_heif_opener()  # which also writes such files

RED, GREEN = (255, 0, 0), (0, 255, 0)


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def read(data: bytes, *, max_pixels: int = 1_000_000, at_least: int | None = None) -> Picture:
    return read_picture(data, background="white", max_pixels=max_pixels, at_least=at_least)


def reason(data: bytes, **options: Any) -> str:
    with pytest.raises(Rejected) as caught:
        read(data, **options)
    return caught.value.reason


def colour(data: bytes, place: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    pixel = read(data).image.getpixel(place)
    assert isinstance(pixel, tuple)
    return pixel


def scene(width: int = 50, height: int = 37) -> Image.Image:
    """Gradients and noise, so that no part of a file is trivial."""
    rows, columns = np.mgrid[:height, :width]
    ramps = np.stack([columns * 200 // width, rows * 200 // height, (rows + columns) % 200], axis=-1)
    noise = np.random.default_rng(0).integers(0, 50, ramps.shape)
    return Image.fromarray((ramps + noise).astype(np.uint8))


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}),
        ("AVIF", {"quality": 95}),
        ("HEIF", {"quality": 95}),
    ],
)
def test_every_usual_format_is_read(file_format: str, options: dict[str, Any]) -> None:
    flat = Image.new("RGB", (24, 16), (200, 100, 50))
    picture = read(encode(flat, file_format, **options))
    assert (picture.width, picture.height, picture.image.mode) == (24, 16, "RGB")
    assert np.abs(np.asarray(picture.image).astype(int) - (200, 100, 50)).max() <= 2


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_are_turned_upright(file_format: str, orientation: int) -> None:
    stored = Image.new("RGB", (32, 16), "black")
    stored.paste("white", (0, 0, 16, 8))
    data = encode(stored, file_format, exif=oriented(orientation))
    stored.info["exif"] = oriented(orientation).tobytes()  # writing AVIF took it out of the other
    upright = ImageOps.exif_transpose(stored)
    picture = read(data)
    assert (picture.width, picture.height) == upright.size == picture.image.size
    assert np.abs(np.asarray(picture.image).astype(int) - np.asarray(upright)).max() < 40


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of broken EXIF
def test_broken_or_endless_exif_costs_a_picture_nothing() -> None:
    head = b"Exif\0\0II*\0\x08\0\0\0"
    for exif in (head, head + b"\xff" * 200, head + b"\1\0\x12\1\3\0\1\0\0\0\x63\0\0\0", b"E" * 60_000):
        for file_format in ("JPEG", "PNG", "WEBP"):
            assert read(encode(scene(), file_format, exif=exif)).image.size == (50, 37)


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), {}),
        (Image.new("LA", (4, 4), (10, 0)), {}),
        (Image.new("L", (4, 4), 7), {"transparency": 7}),
        (Image.new("RGB", (4, 4), RED), {"transparency": RED}),
        (Image.new("RGB", (4, 4), RED).quantize(4), {"transparency": 0}),
        (Image.new("RGB", (4, 4), RED).quantize(4), {"transparency": b"\0"}),
    ],
)
def test_every_kind_of_transparency_shows_the_background(image: Image.Image, options: dict[str, Any]) -> None:
    assert colour(encode(image, "PNG", **options)) == (255, 255, 255)


def test_half_transparent_pixels_mix_with_the_background() -> None:
    for file_format in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        red, green, _ = colour(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), file_format, **options))
        assert red == green == 127


def test_premultiplied_grey_is_read() -> None:
    data = encode(Image.new("LA", (4, 4), (64, 128)), "TIFF")
    entry = struct.pack("<HHI", 338, 3, 1)  # ExtraSamples, a short: 2 is plain opacity, 1 premultiplied
    assert entry + b"\2" in data
    data = data.replace(entry + b"\2", entry + b"\1")
    assert colour(data)[0] == pytest.approx(64 + 127, abs=1)


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16))
    for file_format in ("PNG", "TIFF"):
        pixels = np.asarray(read(encode(ramp, file_format)).image)
        assert (pixels[..., 0].ravel() == np.arange(256)).all()


def test_sixteen_bit_grey_whose_white_is_zero_is_inverted() -> None:
    ramp = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    data = encode(ramp, "TIFF", tiffinfo={262: 0})
    assert np.asarray(read(data).image)[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(("white", "dtype"), [(1, "f4"), (255, "f4"), (65535, "f4"), (65535, "i4")])
def test_the_white_of_deep_grey_is_the_smallest_usual_one_that_fits(white: int, dtype: str) -> None:
    values = np.linspace(0, white * 0.8, 64).reshape(8, 8).astype(dtype)
    pixels = np.asarray(read(encode(Image.fromarray(values), "TIFF")).image)[..., 0]
    expected = np.linspace(0, 204, 64).reshape(8, 8)
    assert np.abs(pixels - expected).max() <= 1


def test_float_values_that_are_no_numbers_are_black() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, -1, 1]], dtype=np.float32)
    assert np.asarray(read(encode(Image.fromarray(values), "TIFF")).image)[0, :, 0].tolist() == [
        0,
        0,
        0,
        0,
        255,
    ]


def test_cmyk_without_a_profile_keeps_its_colours() -> None:
    red = Image.new("RGB", (16, 16), RED).convert("CMYK")
    jpeg = encode(red, "JPEG", quality=95)
    assert b"Adobe" in jpeg  # so its values are stored inverted
    for data in (jpeg, encode(red, "TIFF")):
        assert np.abs(np.array(colour(data)) - RED).max() <= 3


def swapped_profile() -> bytes:
    """sRGB with the primaries of red and green exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")
    assert "sRGB".encode("utf-16-be") in profile  # the description does not decide
    return profile


def linear_grey_profile() -> bytes:
    """A monochrome profile of ICC.1:2001 with gamma 1."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, 256) + b"\0\0"
    tags = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, b"kTRC", 176, 16)
    header = struct.pack(
        ">I4sI4s4s4s12s4s", 192, b"\0" * 4, 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"", b"acsp"
    )
    return (
        header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061) + b"\0" * 48 + tags + white + gamma
    )


def test_colours_of_another_profile_become_srgb() -> None:
    for mode in ("RGB", "RGBA", "P"):
        red = Image.new("RGB", (4, 4), RED).convert(mode)
        assert colour(encode(red, "PNG", icc_profile=swapped_profile())) == GREEN


def test_srgb_itself_is_left_as_it_is_whatever_its_description_says() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = scene(256, 256)
    for profile in (srgb, srgb.replace("sRGB".encode("utf-16-be"), "best".encode("utf-16-be"))):
        opened = read(encode(image, "PNG", icc_profile=profile)).image
        assert np.array_equal(np.asarray(opened), np.asarray(image))


def chunk(kind: bytes, content: bytes) -> bytes:
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    """A PNG file with more chunks behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


LARGE = zlib.compress(bytes(70 << 20))  # of text in all Pillow takes 64 MiB


@pytest.mark.parametrize(
    "more",
    [
        chunk(b"zTXt", b"workflow\0\0" + LARGE),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + LARGE),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + LARGE),
        chunk(b"iCCP", b"printer\0\0" + LARGE),
        chunk(b"iCCP", b"broken\0\0" + b"no zlib"),
        chunk(b"iCCP", b"no end"),
        chunk(b"tEXt", b"workflow\0" + b"x" * (65 << 20)),
        chunk(b"tEXt", b"transparency\0" + b"no number"),
        chunk(b"tEXt", b"interlace\0" + b"no header"),
        chunk(b"tEXt", b"icc_profile\0" + b"no profile"),
        chunk(b"tEXt", b"exif\0" + b"no exif"),
        chunk(b"tEXt", b""),
        chunk(b"eXIf", b"no exif")[:-1] + b"?",
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"x"),
        chunk(b"sRGB", b""),
        chunk(b"pHYs", b"x"),
        chunk(b"acTL", b"x"),
        chunk(b"prIv", b"x")[:-1] + b"?",
    ],
    ids=lambda more: f"{more[4:8].decode()}-{more[8:16].decode(errors='replace')}",
)
def test_what_stands_beside_the_pixels_of_a_png_does_not_decide_over_it(more: bytes) -> None:
    image = scene()
    data = with_chunks(encode(image, "PNG"), more)
    tracemalloc.start()
    picture = read(data).image
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(np.asarray(picture), np.asarray(image))
    assert peak < len(more) + (20 << 20)  # no text is unpacked without a bound


def test_a_profile_of_more_than_a_mebibyte_is_heeded() -> None:
    data = encode(Image.new("RGB", (4, 4), RED), "PNG")
    large = chunk(b"iCCP", b"swapped\0\0" + zlib.compress(swapped_profile() + bytes(3 << 20)))
    assert colour(with_chunks(data, large)) == GREEN


def test_texts_that_turn_a_picture_upright_are_heeded() -> None:
    data = encode(scene(), "PNG")
    xmp = b'<x tiff:Orientation="6"/>'
    raw = b"Raw profile type exif\0"
    exif = oriented(6).tobytes()
    profile = b"\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())
    for text in (
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0XMP\0" + zlib.compress(xmp)),
        chunk(b"tEXt", raw + profile),
        chunk(b"zTXt", raw + b"\0" + zlib.compress(profile)),
    ):
        assert read(with_chunks(data, text)).image.size == (37, 50)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of broken EXIF
def test_broken_segments_beside_the_pixels_of_a_jpeg_cost_it_nothing() -> None:
    data = encode(scene(), "JPEG")
    for marker, content in (
        (0xE2, b"MPF\0II*\0\x08\0\0\0\1\0\1\xb0\4\0\xff\0\0\0\0\0\0\0"),
        (0xE2, b"MPF\0no directory"),
        (0xE2, b"ICC_PROFILE\0\2\5" + b"part of nothing"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<"),
        (0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0"),
        (0xFE, b"transparency"),
    ):
        segment = struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
        assert read(data[:2] + segment + data[2:]).image.size == (50, 37), content


@pytest.mark.parametrize("tag", [{50706: b"\1\4\0\0"}, {254: 1}])
def test_a_preview_in_a_cameras_raw_file_is_not_taken_for_the_picture(tag: dict[int, Any]) -> None:
    assert reason(encode(scene(), "TIFF", tiffinfo=tag)) == "unknown_format"


def test_a_first_look_at_a_heif_file_is_not_at_its_thumbnail() -> None:
    data = encode(scene(320, 224), "HEIF", quality=50, thumbnails=[128])
    picture = read(data, at_least=64)
    assert picture.image.size == (picture.width, picture.height) == (320, 224)


def test_formats_can_be_fewer() -> None:
    data = encode(scene(), "TIFF")
    with pytest.raises(Rejected, match="unknown_format: not one of PNG, JPEG"):
        read_picture(data, background="white", max_pixels=10**6, formats=("PNG", "JPEG"))


def test_grey_of_another_gamma_becomes_srgb() -> None:
    for mode, value in (("L", 128), ("LA", (128, 255))):
        data = encode(Image.new(mode, (4, 4), value), "PNG", icc_profile=linear_grey_profile())
        assert abs(colour(data)[0] - 188) <= 1  # 255 * srgb(128 / 255)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of the TIFF tag
def test_a_profile_that_is_broken_or_of_another_colour_space_is_ignored() -> None:
    for profile in (b"no profile", swapped_profile()[:300], linear_grey_profile()):
        assert colour(encode(Image.new("RGB", (4, 4), RED), "PNG", icc_profile=profile)) == RED
    cmyk = encode(Image.new("RGB", (4, 4), RED).convert("CMYK"), "TIFF", icc_profile=swapped_profile())
    assert colour(cmyk) == RED
    tiff = encode(Image.new("RGB", (4, 4), RED), "TIFF", icc_profile=b"no profile")
    entry = struct.pack("<H", 34675)
    assert colour(tiff.replace(entry + b"\7", entry + b"\6")) == RED  # numbers, not bytes


def test_a_first_look_decodes_a_jpeg_smaller_but_tells_its_true_size() -> None:
    data = encode(scene(1000, 700), "JPEG", exif=oriented(6))
    for at_least, expected in ((None, (700, 1000)), (200, (350, 500)), (175, (175, 250)), (701, (700, 1000))):
        picture = read(data, at_least=at_least)
        assert picture.image.size == expected
        assert (picture.width, picture.height) == (700, 1000)
    assert read(encode(scene(100, 70), "PNG"), at_least=8).image.size == (100, 70)


def test_a_cut_file_is_truncated_at_a_first_look_too() -> None:
    for options in ({}, {"progressive": True}):
        data = encode(scene(1000, 700), "JPEG", **options)
        for share in (0.01, 0.5, 0.9, 0.99):
            for at_least in (None, 64):
                assert reason(data[: int(len(data) * share)], at_least=at_least) == "truncated"


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF"])
def test_a_cut_file_is_truncated_in_every_format(file_format: str) -> None:
    data = encode(scene(), file_format)
    for share in (0.2, 0.5, 0.95):
        assert reason(data[: int(len(data) * share)]) == "truncated"


@pytest.mark.parametrize(("file_format", "signature"), [("JPEG", 3), ("PNG", 8)])
def test_a_file_cut_in_its_header_is_truncated(file_format: str, signature: int) -> None:
    data = encode(scene(), file_format)
    assert {reason(data[:end]) for end in range(signature, 200)} == {"truncated"}


def test_a_broken_file_of_full_length_is_unreadable() -> None:
    data = bytearray(encode(scene(), "PNG"))
    data[len(data) // 2] ^= 255
    assert reason(bytes(data)) == "unreadable"


def test_no_bytes_and_other_formats_are_told_apart() -> None:
    assert reason(b"") == "empty_file"
    others = [encode(scene(), name) for name in ("EPS", "ICO", "PPM", "PCX", "TGA", "JPEG2000")]
    for data in (b"no picture", b"<html>not found</html>", *others):
        assert reason(data) == "unknown_format"


def bomb(side: int) -> bytes:
    """A PNG of side x side grey pixels that ends after its header."""
    data = bytearray(encode(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def test_the_bound_on_pixels_is_ours_alone_and_looks_at_the_header_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow would warn from 89 million pixels and refuse from 179
        for side in (9_500, 13_500):
            assert reason(bomb(side), max_pixels=side * side - 1) == "too_many_pixels"
            assert reason(bomb(side), max_pixels=side * side) != "too_many_pixels"
    assert read(encode(scene(), "PNG"), max_pixels=50 * 37).width == 50


def seeds() -> dict[str, bytes]:
    """A file of each kind."""
    exif, profile = oriented(6), swapped_profile()
    exif[271] = "a camera"
    grey = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    palette = scene().quantize(16)
    return {
        "jpeg": encode(scene(), "JPEG", exif=exif, icc_profile=profile),
        "progressive": encode(scene(), "JPEG", progressive=True),
        "cmyk": encode(scene().convert("CMYK"), "JPEG"),
        "png": encode(scene(), "PNG", exif=exif, icc_profile=profile),
        "palette": encode(palette, "PNG", transparency=b"\0\x80"),
        "png16": encode(grey, "PNG"),
        "webp": encode(scene(), "WEBP", exif=exif, icc_profile=profile),
        "gif": encode(palette, "GIF", transparency=3),
        "tiff": encode(scene(), "TIFF", exif=exif, icc_profile=profile),
        "lzw": encode(scene(), "TIFF", compression="tiff_lzw"),
        "tiff16": encode(grey, "TIFF"),
        "bmp": encode(scene(), "BMP"),
        "avif": encode(scene(), "AVIF", exif=exif, icc_profile=profile),
        "heif": encode(scene(), "HEIF", exif=exif, icc_profile=profile),
    }


@pytest.mark.parametrize("kind", seeds())
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of broken EXIF and TIFF tags
def test_any_bytes_end_as_a_picture_or_as_rejected(kind: str) -> None:
    data, generator = seeds()[kind], np.random.default_rng(0)
    reasons = set()
    for attempt in range(300):
        broken = bytearray(data)
        reach = len(data) if attempt % 2 else min(len(data), 400)  # the headers, every other time
        for place in generator.integers(0, reach, generator.integers(1, 6)):
            broken[place] = generator.integers(256)
        end = generator.integers(1, len(data)) if attempt % 3 == 0 else len(data)
        try:
            assert read(bytes(broken[:end]), at_least=16 if attempt % 5 == 0 else None).image.mode == "RGB"
        except Rejected as rejected:
            reasons.add(rejected.reason)
    assert {"truncated", "unreadable"} <= reasons


def test_decoding_for_training_crops_the_centre_of_what_was_read() -> None:
    wide = Image.new("RGB", (40, 20), "black")
    wide.paste("white", (10, 0, 30, 20))
    pixels = decode_image(encode(wide, "PNG"), resolution=20, background="white")
    assert pixels.shape == (20, 20, 3) and pixels.dtype == np.uint8 and (pixels == 255).all()


def test_pixels_survive_png() -> None:
    pixels = np.asarray(scene())
    assert (np.asarray(read(encode_png(pixels)).image) == pixels).all()
