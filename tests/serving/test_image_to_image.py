"""A row that begins with a picture is that of diffusers' image to image pipeline, whatever else is drawn."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ray_jobs.pictures.reading import decode_image
from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.replica.image_input import read_picture
from serving.request import Request, RequestError
from serving.schemas import APIError
from tests.conftest import draw
from tests.serving import plain_diffusers
from tests.serving.test_engine import OF_STABLE_DIFFUSION_1_5, UNETS, with_scheduler
from tests.tiny_models import FAMILY_MODELS

TOLERANCE = 0.65
"""Of a pixel's 255 levels: half of one for rounding, the rest for a batch's arithmetic, the encoder's too."""


def picture(height: int, width: int, number: int = 0) -> torch.Tensor:
    """uint8, height x width x 3."""
    drawn = draw("a small red circle", number).resize((width, height))
    return torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8).reshape(height, width, 3)


# Above with its schedulers; diffusers has no such pipeline for FLUX.2 and 3 and Ideogram 4.
NOT_COMPARED = (
    "StableDiffusionPipeline",
    "Flux2KleinPipeline",
    "Flux2Pipeline",
    "Flux3ModularPipeline",
    "Flux3DistilledModularPipeline",
    "Ideogram4Pipeline",
)
SQUARE, WIDE = (64, 64), (32, 64)
MIXED = [
    Request("a small red circle", 0, 5, 3.0, None, *SQUARE, image=picture(*SQUARE), strength=0.5),
    Request("a big blue cross", 7, 4, 1.0, None, *SQUARE),
    Request("a big blue cross", 7, 4, 7.5, None, *WIDE, image=picture(*WIDE), strength=0.75),
    Request("", 3, 3, 2.0, "a big purple square", *SQUARE, image=picture(*SQUARE, number=5)),
    Request("a big blue cross", 1, 7, 1.0, None, *SQUARE, image=picture(*SQUARE), strength=0.3),
]


def engine_of(folder: Path, **options: Any) -> Engine:
    return Engine(load_pipeline(str(folder)), **options)


@pytest.mark.parametrize(
    ("model", "scheduler"),
    [
        *(("StableDiffusionPipeline", name) for name in (*UNETS, "PNDMScheduler")),
        *((name, None) for name in FAMILY_MODELS if name not in NOT_COMPARED),
        ("StableDiffusion3Pipeline-without-t5", None),
    ],
)
def test_a_row_that_begins_with_a_picture_is_that_of_plain_diffusers_in_any_batch(
    tiny: Callable[[str], Path], model: str, scheduler: str | None
) -> None:
    folder = tiny(model)
    # Stable Diffusion's pipelines turn DDIM's clipping off when they are made, and the one for image to image
    # is made of the other.
    options: dict[str, Any] = {"clip_sample": False} if scheduler == "DDIMScheduler" else {}
    options = OF_STABLE_DIFFUSION_1_5 if scheduler == "PNDMScheduler" else options
    plain = with_scheduler(plain_diffusers.load(folder), scheduler, **options)
    engine = Engine(with_scheduler(load_pipeline(str(folder)), scheduler, **options), max_rows=8)
    requests = [plain_diffusers.understood(plain, request) for request in MIXED]
    futures = [engine.submit(request) for request in requests]
    engine.drain()
    alone = engine.submit(requests[0])
    engine.drain()
    for request, future in zip([*requests, requests[0]], [*futures, alone], strict=True):
        expected = plain_diffusers.draw(plain, request)
        assert (future.result(0).pixels - expected).abs().max() <= TOLERANCE, request


def test_a_weaker_one_stays_closer_to_the_picture_and_makes_fewer_steps(tiny_model: Path) -> None:
    engine = engine_of(tiny_model)
    image = picture(*SQUARE)
    distances, calls = [], []
    for strength in (0.2, 0.6, 1.0):
        before = engine.load().calls
        future = engine.submit(Request("a big blue cross", 0, 10, 3.0, image=image, strength=strength))
        engine.drain()
        distances.append((future.result(0).pixels.float() - image).abs().mean())
        calls.append(engine.load().calls - before)
    assert calls == [2, 6, 10]
    assert distances[0] < distances[1] < distances[2]


def test_encoding_holds_up_the_steps_of_others_by_a_chunk_at_most(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, max_rows=6, decode_rows=2)
    chunks: list[int] = []
    engine.pipeline.vae.encoder.register_forward_pre_hook(lambda _, inputs: chunks.append(len(inputs[0])))
    running = engine.submit(Request("a", 0, 9, 1.0))
    others = [engine.submit(Request("a", seed, 2, 1.0, image=picture(*SQUARE))) for seed in range(5)]
    for calls in range(1, 4):
        engine.step()
        assert engine.load().calls == calls and len(chunks) == calls
    assert chunks == [2, 2, 1] and engine.load().encoding == 0
    assert others[0].done() and not others[4].done() and not running.done()


def test_rows_that_wait_to_be_encoded_have_places_and_can_be_cancelled(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, max_rows=3, decode_rows=1)
    futures = [engine.submit(Request("a", seed, 4, 1.0, image=picture(*SQUARE))) for seed in range(4)]
    engine.step()
    assert engine.load()[1:4] == (1, 2, 1)  # waiting, encoding, running
    assert futures[2].cancel()
    engine.drain()
    assert [future.cancelled() for future in futures] == [False, False, True, False]


def test_a_picture_that_cannot_be_encoded_fails_its_chunk_only(tiny_model: Path) -> None:
    engine = engine_of(tiny_model)
    kept = engine.submit(Request("a", 0, 3, 1.0))
    lost = engine.submit(Request("a", 0, 3, 1.0, image=picture(*SQUARE)))

    def burn(_: Any, inputs: tuple[torch.Tensor]) -> None:
        raise RuntimeError("out of memory")

    engine.pipeline.vae.encoder.register_forward_pre_hook(burn)
    engine.drain()
    assert kept.result(0).pixels.shape == (64, 64, 3)
    with pytest.raises(RuntimeError, match="out of memory"):
        lost.result(0)


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def as_file(pixels: np.ndarray) -> bytes:
    return saved(Image.fromarray(pixels), "PNG")


def test_a_picture_of_another_size_is_cut_evenly_and_scaled() -> None:
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 40:80] = 200  # the middle third, which is square
    opened = read_picture(as_file(image), 20, 20)
    assert opened.shape == (20, 20, 3) and (opened[:, 3:17] == 200).all()
    assert read_picture(as_file(image[:10, :7]), 33, 48).shape == (33, 48, 3)
    noise = np.random.default_rng(0).integers(0, 256, (40, 120, 3), np.uint8)
    assert (read_picture(as_file(noise), 40, 120).numpy() == noise).all(), "one that fits stays as it is"


def test_what_is_transparent_becomes_white() -> None:
    image = np.zeros((40, 40, 4), np.uint8)
    image[:, 20:] = (255, 0, 0, 255)
    opened = read_picture(as_file(image), 20, 20)
    assert (opened[:, :8] == 255).all()
    assert (opened[:, 12:] == torch.tensor([255, 0, 0])).all()


def test_an_uploaded_picture_is_read_as_training_reads_its_pictures() -> None:
    """Deep grey, a turned photograph, CMYK, and colours of another profile, whose description says sRGB."""
    ramp = Image.fromarray(np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64))
    assert read_picture(saved(ramp, "PNG"), 64, 64)[..., 0].flatten().tolist() == [
        round(value / 257) for value in np.asarray(ramp).ravel().tolist()
    ]
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64))
    turned = Image.Exif()
    turned[0x112] = 6
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")
    for content in (
        saved(photo, "JPEG", exif=turned),
        saved(photo.convert("CMYK"), "JPEG"),
        saved(photo, "WEBP", icc_profile=swapped),
        saved(photo, "PNG", icc_profile=swapped),
    ):
        trained = decode_image(content, resolution=64, background="white")
        assert np.array_equal(read_picture(content, 64, 64), trained)
        assert not np.array_equal(trained, np.asarray(photo))


def test_a_format_that_is_not_offered_is_refused() -> None:
    with pytest.raises(APIError, match="not a picture in one of PNG, JPEG, WEBP"):
        read_picture(saved(Image.new("RGB", (64, 64)), "TIFF"), 64, 64)


@pytest.mark.parametrize("shape", [(1, 1_000_000), (1_000_000, 1)])
def test_a_line_a_pixel_wide_takes_no_memory_but_its_own(shape: tuple[int, int]) -> None:
    """Scaled until it covers 64 x 64 pixels it would be 12 GB."""
    opened = read_picture(as_file(np.full((*shape, 3), 9, np.uint8)), 64, 64)
    assert opened.shape == (64, 64, 3) and (opened == 9).all()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"strength": 0.5}, "strength: 0.5; needs an initial image"),
        ({"image": picture(*SQUARE), "strength": 0.0}, "strength: 0.0; must be above 0"),
        ({"image": picture(*SQUARE), "strength": float("nan")}, "strength: nan"),
        ({"image": picture(*SQUARE), "strength": 0.2}, "strength: 0.2 of 4 steps leaves no step"),
        ({"image": picture(*WIDE)}, r"image: \(32, 64, 3\) of torch.uint8; uint8, 64 x 64 x 3 is needed"),
        ({"image": picture(*SQUARE).float()}, "of torch.float32"),
    ],
)
def test_what_cannot_be_begun_with_is_refused(tiny_model: Path, fields: dict[str, Any], told: str) -> None:
    engine = engine_of(tiny_model)
    with pytest.raises(RequestError, match=told) as refused:
        engine.submit(replace(Request("a", 0, 4, 3.0), **fields))
    assert refused.value.field == list(fields)[-1]
    assert not engine.unfinished
