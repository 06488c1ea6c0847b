"""The files that clients get: of every format and quality, in the answer or at an address that expires."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from cluster.storage import Storage
from serving.encoding import Output, encode
from serving.provenance import facts_of, read_provenance
from serving.schemas import APIError
from serving.service.picture_links import PictureLinks
from tests.serving.endpoint_here import EndpointHere, endpoint_here

PROMPT = "a small red circle"


@pytest.fixture(scope="module")
def here(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EndpointHere]:
    with endpoint_here(tmp_path_factory.mktemp("here"), tiny_model, max_steps=8) as endpoint:
        yield endpoint


def images(here: EndpointHere) -> Any:
    """Of OpenAI's client, with this server's fields, which its types do not have."""
    return here.client.images


def decoded(file: bytes) -> tuple[str, np.ndarray]:
    with Image.open(io.BytesIO(file)) as image:
        return str(image.format).lower(), np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats_have_the_pictures_pixels_and_its_provenance(here: EndpointHere, kind: Any) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "extra_body": {"seed": 3}}
    png = base64.b64decode(images(here).generate(**body).data[0].b64_json or "")
    answer = images(here).generate(output_format=kind, **body)
    assert answer.output_format == kind
    found, pixels = decoded(fine := base64.b64decode(answer.data[0].b64_json or ""))
    assert found == kind and np.abs(pixels - decoded(png)[1]).mean() < (3 if kind == "jpeg" else 1e-9)
    facts, of_png = read_provenance(fine) or {}, read_provenance(png) or {}
    assert facts.pop("image_id") != of_png.pop("image_id") and facts == of_png
    small = images(here).generate(output_format=kind, output_compression=10, **body)
    assert len(base64.b64decode(small.data[0].b64_json or "")) < len(fine)
    *previews, last = images(here).generate(
        output_format=kind, stream=True, partial_images=1, quality="high", **body
    )
    assert [decoded(base64.b64decode(each.b64_json))[0] for each in (*previews, last)] == [kind, kind]
    assert (last.output_format, last.quality) == (kind, "high")


def test_a_quality_chooses_the_steps(here: EndpointHere) -> None:
    steps = {}
    for quality in ("auto", "low", "medium", "standard", "high", "hd", "xhigh", "max"):
        answer = images(here).generate(prompt=PROMPT, quality=quality)
        steps[quality] = (read_provenance(base64.b64decode(answer.data[0].b64_json)) or {})["steps"]
        assert answer.quality == {"auto": None, "standard": "medium", "hd": "high"}.get(quality, quality)
    usual, most = here.config.serve.default_steps, here.config.serve.max_steps
    assert steps["auto"] == steps["medium"] == steps["standard"] == usual == 2
    assert (steps["low"], steps["high"], steps["hd"], steps["xhigh"]) == (1, 3, 3, 4)
    assert steps["max"] == most


def test_an_address_gives_the_file_to_whoever_has_it_and_to_nobody_else(here: EndpointHere) -> None:
    answer = images(here).generate(
        prompt=PROMPT, n=2, response_format="url", output_format="webp", user="someone"
    )
    assert [each.b64_json for each in answer.data] == [None, None]
    assert answer.safety_identifier == "someone"
    files = []
    for each in answer.data:
        assert each.url and each.url.startswith(f"{here.url}/v1/pictures/")
        got = httpx.get(each.url)
        assert (got.status_code, got.headers["content-type"]) == (200, "image/webp")
        assert got.headers["x-content-type-options"] == "nosniff"
        assert (read_provenance(got.content) or {})["image_id"] == each.id
        files.append(got.content)
    assert len(set(files)) == 2
    address = answer.data[0].url or ""
    for wrong in (
        re.sub(r"signature=\w{4}", "signature=0000", address),
        re.sub(r"img-\w{4}", "img-0000", address),
        re.sub(r"expires=\d", "expires=9", address),
        address.partition("?")[0],
        f"{here.url}/v1/pictures/..%2F/here.yaml?expires=9999999999&signature=00",
    ):
        refused = httpx.get(wrong)
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] in ("picture_not_found", None)


def test_variations_begin_with_the_picture_and_differ(here: EndpointHere) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (30, 200, 30)).save(file, "PNG")
    near: Any = images(here).create_variation(
        image=file.getvalue(),
        n=2,
        size="64x64",
        extra_body={"strength": 0.5, "seed": 1, "steps": 4},
    )
    far: Any = images(here).create_variation(
        image=file.getvalue(), response_format="url", extra_body={"strength": 1, "seed": 1, "steps": 4}
    )
    one, other = (decoded(base64.b64decode(each.b64_json))[1] for each in near.data)
    given = np.full((64, 64, 3), (30, 200, 30))
    assert not np.array_equal(one, other)
    whole = decoded(httpx.get(far.data[0].url).content)[1]
    assert np.abs(one - given).mean() < np.abs(whole - given).mean()
    with pytest.raises(openai.BadRequestError, match="to /v1/images/edits"):
        images(here).create_variation(image=file.getvalue(), extra_body={"mask": "x"})


class Clock:
    now = 1_000_000_000.0

    def __call__(self) -> float:
        return self.now


def test_an_address_expires_and_its_file_is_deleted_later(tmp_path: Path) -> None:
    clock = Clock()
    links = PictureLinks(Storage.open(str(tmp_path)), lambda: b"key", 60, clock)

    def read(address: str) -> bytes:
        found = re.fullmatch(r"v1/pictures/(.*)\?expires=(\d+)&signature=(\w+)", address)
        assert found
        name, expires, signature = found.groups()
        return links.read(name, int(expires), signature)

    address = links.store(f"img-{0:024x}", b"content", "png")
    clock.now += 3599
    links.delete_expired()
    assert read(address) == b"content"
    clock.now += 1
    with pytest.raises(APIError, match="valid for 60 minutes") as expired:
        read(address)
    assert expired.value.status == 410 and expired.value.code == "picture_expired"
    later = links.store(f"img-{1:024x}", b"content", "png")
    clock.now += 2 * 3600
    links.delete_expired()
    assert len(list(tmp_path.rglob("*.png"))) == 1
    clock.now -= 2 * 3600
    assert read(later) == b"content"
    next(tmp_path.rglob("*.png")).unlink()
    with pytest.raises(APIError, match="no longer stored") as gone:
        read(later)
    assert gone.value.status == 404


def test_prompts_that_do_not_fit_into_a_jpeg_are_left_out_of_its_facts() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    for length, kept in ((1000, True), (70_000, False)):
        facts = facts_of({"seed": 1, "prompt": "\N{SNOWMAN}" * length}, base="tiny")
        found = read_provenance(encode(pixels, facts, Output("jpeg"))) or {}
        assert (found["seed"], "prompt" in found) == (1, kept)


@pytest.mark.parametrize("file", [b"", b"\xff\xd8\xff", b"RIFF\x00\x00\x00\x00WEBP", b"GIF89a"])
def test_other_files_have_no_provenance(file: bytes) -> None:
    assert read_provenance(file) is None
    assert read_provenance(encode(np.zeros((8, 8, 3), np.uint8), None, Output("webp"))) is None
