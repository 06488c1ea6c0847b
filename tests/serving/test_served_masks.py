"""What is painted into a mask is the picture of the family's own pipeline, in any batch and over HTTP."""

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from ray_jobs.config import Config
from ray_jobs.registry.digests import weights_digest
from ray_jobs.registry.models import RegisteredModel
from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.engine.rows import Drawing
from serving.replica.image_input import read_masked
from serving.request import Request, RequestError
from tests.serving import plain_diffusers
from tests.serving.endpoint_here import page_of
from tests.serving.test_adapters import VARIANTS, write_adapter
from tests.serving.test_engine import TOLERANCE, drawn
from tests.serving.test_served_edits import as_file, picture, pixels
from tests.serving.test_web import CHROMIUM, FIRST_PNG, chromium, copied, draw, opened, until
from tests.tiny_models import BY_NAME, MODELS

PAINTERS = [name for name in MODELS if BY_NAME[name][0].paints_masks]
SQUARE, WIDE = (64, 64), (64, 96)


def masked(seed: int, height: int, width: int, left: int = 5) -> torch.Tensor:
    """A picture with a hole: uint8, height x width x 4."""
    alpha = torch.full((height, width, 1), 255, dtype=torch.uint8)
    alpha[3:41, left : left + 30] = 0
    return torch.cat([picture(seed, height + 15, width)[:height], alpha], dim=2)


# By when they join: rows with masks, without, and that begin with an image.
MIXED = [
    (0, Request("a small red circle", 0, 5, 30.0, None, *SQUARE, masked=masked(1, *SQUARE))),
    (0, Request("a big blue cross", 7, 3, 2.0, None, *SQUARE)),
    (1, Request("a big blue cross", 7, 4, 30.0, None, *SQUARE, masked=masked(2, *SQUARE, left=20))),
    (1, Request("a big blue cross", 7, 3, 4.0, None, *WIDE, masked=masked(1, *WIDE))),
    (2, Request("a", 1, 6, 9.0, image=picture(4, *SQUARE), strength=0.5, masked=masked(4, *SQUARE))),
]


@pytest.mark.parametrize("name", PAINTERS)
def test_every_painting_in_a_changing_batch_is_that_of_the_plain_pipeline(
    tiny: Callable[[str], Path], name: str
) -> None:
    engine = Engine(plain_diffusers.attentive(load_pipeline(str(tiny(name)))), max_rows=6, num_cores=2)
    requests = [
        (call, replace(each, height=each.height or 64, width=each.width or 64)) for call, each in MIXED
    ]
    futures: list[Future[Drawing]] = []
    for call in range(3):
        futures += [engine.submit(request) for when, request in requests if when == call]
        engine.step()
    engine.drain()
    pictures = [future.result(0).pixels for future in futures] + drawn(engine, requests[0][1])
    plain = plain_diffusers.attentive(plain_diffusers.load(tiny(name)))
    for (_, request), drawing in zip([*requests, requests[0]], pictures, strict=True):
        assert (drawing - plain_diffusers.draw(plain, request)).abs().max() <= TOLERANCE, request
    for other in (None, masked(1, *SQUARE, left=20), masked(2, *SQUARE)):
        (different,) = drawn(engine, replace(requests[0][1], masked=other))
        assert (pictures[0].float() - different).abs().max() >= 2, "picture and mask matter"
    with pytest.raises(RequestError, match=r"\(64, 96, 4\) of torch.uint8; uint8, 64 x 64 x 4") as refused:
        engine.submit(replace(requests[0][1], masked=masked(1, *WIDE)))
    assert refused.value.field == "masked"


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attentive")
    plain_diffusers.attentive(plain_diffusers.load(tiny(PAINTERS[0]))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(config: Config, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An endpoint of a FLUX.1 Fill."""
    folder = tmp_path_factory.mktemp("fill")
    write_adapter(model, folder / "1", 1, **VARIANTS["attention"])
    weights = str(folder / "1")
    version = RegisteredModel("fill", 1, weights, weights_digest(weights), str(model), None, "lora", {})
    with page_of(config, version, replace(version, version=2), folder, max_side=128) as address:
        yield address


def edited(url: str, image: bytes, **fields: Any) -> Any:
    own = {"seed": 3, "steps": 3, "guidance_scale": 30.0} | fields.pop("own", {})
    given: dict[str, Any] = {"mask": ("mask.png", fields.pop("mask"))} if "mask" in fields else {}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        return client.images.edit(
            image=("image.png", image), prompt="a red star", model="base", extra_body=own, **given, **fields
        )


PHOTO = picture(1, 80, 112)[:72]
FILE = as_file(PHOTO)
HOLE = as_file(masked(2, 72, 112))


def test_a_mask_of_an_edit_is_painted_into(url: str, model: Path) -> None:
    answers = [edited(url, FILE, mask=HOLE), edited(url, FILE, mask=HOLE, size="64x64")]
    assert [each.size for each in answers] == ["112x64", "64x64"]
    plain = plain_diffusers.load(model)
    for answer, size in zip(answers, (None, (64, 64)), strict=True):
        hole = read_masked(FILE, HOLE, size, 16, 128)
        assert 0.1 < float((hole[..., 3] == 0).float().mean()) < 0.4
        height, width = hole.shape[:2]
        request = Request("a red star", 3, 3, 30.0, None, height, width, masked=hole)
        assert (pixels(answer.data[0]) - plain_diffusers.draw(plain, request)).abs().max() <= TOLERANCE
    begun = pixels(edited(url, FILE, mask=HOLE, own={"strength": 0.4}).data[0]).float()
    assert (begun - pixels(answers[0].data[0])).abs().max() > 2
    assert {each["masks"] for each in httpx.get(f"{url}/v1/models").json()["data"]} == {True}


def test_an_image_is_cut_as_its_mask() -> None:
    hole = read_masked(FILE, HOLE, None, 16, 128)
    assert torch.equal(hole[..., :3], PHOTO[4:68])
    assert torch.equal(hole[..., 3], masked(2, 72, 112)[4:68, :, 3])


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({}, "mask", "missing; this model paints into a PNG's transparent pixels"),
        ({"mask": as_file(masked(2, 64, 64))}, "mask", "64x64 and the image 112x72 pixels; send a mask"),
        ({"mask": FILE}, "mask", "no pixel is transparent"),
        ({"mask": as_file(masked(2, 72, 112).fill_(255))}, "mask", "no pixel is transparent"),
        ({"mask": b"GIF89a"}, "mask", "not a readable PNG"),
        ({"mask": HOLE, "size": "60x60"}, "size", "60; must be a multiple of 16 pixels"),
    ],
)
def test_a_mask_that_cannot_be_painted_into_is_named(
    url: str, fields: dict[str, Any], param: str, told: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=told) as refused:
        edited(url, FILE, **fields)
    assert refused.value.param == param


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium on the PATH")
def test_the_page_paints_into_what_is_painted_over_or_chosen(url: str, tmp_path: Path) -> None:
    """Also again from its history, and by the programs that it copies."""
    photo, hole = tmp_path / "photo.png", tmp_path / "hole.png"
    photo.write_bytes(FILE)
    hole.write_bytes(HOLE)
    with (
        chromium() as browser,
        opened(browser, url, permissions=["clipboard-read", "clipboard-write"]) as page,
    ):
        page.select_option("#model", "base")
        page.fill("#steps", "3")
        page.fill("#guidance_scale", "30")
        page.fill("#prompt", "a red star")
        assert not page.is_visible("#mask-canvas")
        page.set_input_files("#image", photo)
        page.wait_for_selector("#mask-canvas")
        page.click("#draw")
        page.wait_for_selector("#mask-error:not(:empty)")
        assert "Paint over what is to be drawn" in page.inner_text("#mask-error")
        page.set_input_files("#mask", str(_named(tmp_path / "other.png", masked(2, 64, 64))))
        until(page, "document.getElementById('mask-error').textContent.includes('112 × 72')")

        page.set_input_files("#mask", hole)
        until(page, "document.getElementById('mask-error').textContent === ''")
        draw(page, "a red star", seed=3)
        shown = page.evaluate(FIRST_PNG)
        expected = edited(url, FILE, mask=HOLE)
        assert torch.equal(_opened(bytes(shown)), pixels(expected.data[0]))
        page.click(".python")
        program = copied(page)
        (tmp_path / "mask.png").write_bytes(HOLE)
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
        assert torch.equal(_opened((tmp_path / "picture.png").read_bytes()), _opened(bytes(shown)))

        page.reload()
        page.click(".reuse")
        page.wait_for_selector("#mask-canvas")
        painted = (
            "[...document.getElementById('mask-canvas').getContext('2d').getImageData(0, 0, 112, 72).data]"
        )
        share = f"{painted}.filter((value, place) => place % 4 === 3 && value === 255).length / (112 * 72)"
        until(page, f"{share} > 0.1")
        page.click("#clear-mask")
        assert page.evaluate(share) == 0
        box = page.locator("#mask-canvas").bounding_box()
        page.mouse.move(box["x"] + 5, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 5, box["y"] + box["height"] / 2, steps=4)
        page.mouse.up()
        assert 0.05 < page.evaluate(share) < 0.4
        page.click("#draw")  # the mask is made first, so that the entry comes a little later
        until(page, "document.querySelectorAll('.entry').length === 2")
        page.wait_for_selector("#cancel", state="hidden")
        assert page.locator(".entry:first-child .given img").count() == 2
        by_hand = page.evaluate(FIRST_PNG.replace("[0].pic", ".at(-1).pic"))
        assert (_opened(bytes(by_hand)).int() - _opened(bytes(shown)).int()).abs().max() > 2


def _named(file: Path, picture: torch.Tensor) -> Path:
    file.write_bytes(as_file(picture))
    return file


def _opened(content: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content))))
