"""A row that looks at reference pictures is the picture of the family's own pipeline, in any batch.

Over HTTP they are the pictures of an edit.
"""

import base64
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from diffray.endpoints import Endpoint
from diffray.settings import stage_arguments
from ray_jobs.config import Config
from ray_jobs.registry.digests import weights_digest
from ray_jobs.registry.models import RegisteredModel
from ray_jobs.weights.loading import load_lora, load_pipeline
from serving.engine.engine import Engine
from serving.engine.rows import Drawing
from serving.feedback.database import open_database
from serving.feedback.replay import Replayer, Unavailable
from serving.feedback.store import FeedbackStore
from serving.provenance import read_provenance
from serving.replica.image_input import read_picture, read_references
from serving.replica.replica import first_requests
from serving.request import Request, RequestError
from serving.schemas import APIError
from tests.serving import plain_diffusers
from tests.serving.page_server import page_server
from tests.serving.test_adapters import VARIANTS, write_adapter
from tests.serving.test_engine import TOLERANCE, drawn, steps_of
from tests.serving.test_web import CHROMIUM, FIRST_PNG, chromium, copied, draw, opened
from tests.tiny_models import BY_NAME, MODELS
from tests.unit.test_python_api import recorded

EDITORS = [name for name in MODELS if BY_NAME[name][0].max_references]
SQUARE, WIDE = (64, 64), (64, 96)


def picture(seed: int, height: int, width: int) -> torch.Tensor:
    """A picture of broad bands: uint8, height x width x 3."""
    colours = torch.rand((height // 16, width // 16, 3), generator=torch.Generator().manual_seed(seed))
    return (255 * colours).to(torch.uint8).repeat_interleave(16, 0).repeat_interleave(16, 1)


def looking(*pictures: tuple[int, int, int]) -> dict[str, Any]:
    return {"references": tuple(picture(*each) for each in pictures)}


# By when they join: plain rows, and rows with references of one size, of another, and of several.
MIXED = [
    (0, Request("a small red circle", 0, 5, 3.0, None, *SQUARE, **looking((1, *SQUARE)))),
    (0, Request("a big blue cross", 7, 3, 1.0, None, *SQUARE)),
    (1, Request("a big blue cross", 7, 4, 1.0, None, *SQUARE, "changed", **looking((2, *SQUARE)))),
    (1, Request("a big blue cross", 7, 3, 4.0, None, *WIDE, **looking((1, *WIDE)))),
    (2, Request("", 3, 3, 2.0, "a big purple square", *SQUARE, "changed", **looking((3, *SQUARE)))),
    (2, Request("a red star", 1, 2, 3.0, None, *SQUARE, "changed")),
    (2, Request("a red star", 1, 3, 3.0, None, *SQUARE, **looking((1, *WIDE), (2, *SQUARE)))),
    (3, Request("a red star", 1, 2, 1.0, None, *SQUARE, "changed", **looking((4, *SQUARE), (1, *SQUARE)))),
]


@pytest.mark.parametrize("model", EDITORS)
def test_every_edit_in_a_changing_batch_is_that_of_the_plain_pipeline(
    tiny: Callable[[str], Path], tmp_path: Path, model: str
) -> None:
    folder, (family, _) = tiny(model), BY_NAME[model]
    options = VARIANTS["attention"]
    if (
        model == "QwenImageEditPlusPipeline"
    ):  # layers that see a timestep more for each row, that of references
        options = options | {"target_modules": ["to_q", "img_mod.1", "timestep_embedder.linear_1"]}
    adapter = write_adapter(folder, tmp_path / "changed", 0, **options)
    pipeline = plain_diffusers.attentive(load_pipeline(str(folder)))
    engine = Engine(pipeline, max_rows=6, num_cores=2, adapter_folder=lambda _: adapter)
    requests = [each for each in MIXED if len(each[1].references) <= family.max_references]
    requests = [(call, plain_diffusers.understood(pipeline, request)) for call, request in requests]
    futures: list[Future[Drawing]] = []
    for call in range(4):
        futures += [engine.submit(request) for when, request in requests if when == call]
        engine.step()
    engine.drain()
    pictures = [future.result(0).pixels for future in futures] + drawn(engine, requests[0][1])
    plain = {name: plain_diffusers.attentive(plain_diffusers.load(folder)) for name in (None, "changed")}
    load_lora(plain["changed"], adapter)
    for (_, request), drawing in zip([*requests, requests[0]], pictures, strict=True):
        expected = plain_diffusers.draw(plain[request.adapter], request)
        assert drawing.shape == expected.shape
        assert (drawing - expected).abs().max() <= TOLERANCE, request
    for others in ((), looking((2, *SQUARE))["references"]):
        (other,) = drawn(engine, replace(requests[0][1], references=others))
        assert (pictures[0].float() - other).abs().max() >= 2, "what is looked at matters"


def test_rows_share_a_call_where_their_references_have_the_same_sizes(tiny: Callable[[str], Path]) -> None:
    """References are encoded between steps, a chunk at a time, and take as many places as other pixels."""
    engine = Engine(load_pipeline(str(tiny("Flux2KleinPipeline"))), max_rows=4, decode_rows=2)
    engine.scheduler.max_pixels = 8 * 64 * 64  # as if its own pictures had 64 x 64
    chunks: list[int] = []
    engine.pipeline.vae.encoder.register_forward_pre_hook(lambda _, inputs: chunks.append(len(inputs[0])))
    plain = Request("a", 0, 9, 1.0, None, *SQUARE)
    two = looking((1, *SQUARE), (2, *SQUARE))
    futures = [engine.submit(plain)] + [engine.submit(replace(plain, steps=2, **two)) for _ in range(3)]
    engine.step()
    # One and twice three of these eight; the fourth row waits.
    assert (engine.load().waiting, engine.load().running, engine.load().encoding) == (1, 2, 1)
    assert chunks == [2] and engine.load().calls == 1
    steps_of(engine, 1)
    assert chunks == [2, 2] and engine.load().encoding == 0
    rows: list[int] = []
    engine.denoiser.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    engine.drain()
    assert max(rows) == 2 and len(chunks) == 3
    assert torch.equal(futures[1].result(0).pixels, futures[2].result(0).pixels)


def test_the_engine_does_not_rest_while_references_of_many_sizes_are_encoded(
    tiny: Callable[[str], Path],
) -> None:
    """Each size is a call of its own, and nothing else is there to do."""
    engine = Engine(load_pipeline(str(tiny("Flux2KleinPipeline"))))
    sizes = looking((1, *SQUARE), (2, *WIDE), (3, 96, 64), (4, 32, 32))
    future = engine.submit(Request("a", 0, 1, 1.0, None, *SQUARE, **sizes))
    while not future.done():
        assert engine.step()


def test_edits_are_compiled_before_they_are_asked_for(tiny: Callable[[str], Path]) -> None:
    for model, expected in (
        ("Flux2KleinPipeline", [(0, 1.0), (0, 2.0), (1, 1.0), (1, 2.0), (2, 1.0), (2, 2.0)]),
        ("StableDiffusionPipeline", [(0, 1.0), (0, 2.0)]),
    ):
        engine = Engine(load_pipeline(str(tiny(model))))
        requests = first_requests(engine, 1, compiled=True)
        assert [(len(each.references), each.guidance_scale) for each in requests] == expected
        drawn(engine, *(replace(each, height=64, width=64) for each in requests))
        assert len(first_requests(engine, 1, compiled=False)) == 1


def test_an_initial_image_and_references_go_together(tiny: Callable[[str], Path]) -> None:
    engine = Engine(plain_diffusers.attentive(load_pipeline(str(tiny("FluxKontextPipeline")))))
    begun = Request("a", 0, 10, 1.0, None, *SQUARE, image=picture(5, *SQUARE), strength=0.2)
    both = replace(begun, **looking((1, *WIDE)))
    plain, weak, strong = (each.float() for each in drawn(engine, begun, both, replace(both, strength=1.0)))
    assert (plain - weak).abs().max() >= 2, "what is looked at matters"
    assert (plain - weak).abs().mean() < (plain - strong).abs().mean() / 4, "so does what it begins with"


@pytest.mark.parametrize(
    ("model", "references", "told"),
    [
        (
            "FluxKontextPipeline",
            2 * (picture(1, *SQUARE),),
            "references: 2 given; this model takes at most 1",
        ),
        ("FluxPipeline", (picture(1, *SQUARE),), "references: 1 given; this model takes none"),
        (
            "FluxKontextPipeline",
            (picture(1, *SQUARE)[:33],),
            r"\(33, 64, 3\) of .*multiples of 16",
        ),
        ("FluxKontextPipeline", (picture(1, 144, 64),), r"\(144, 64, 3\) of torch.uint8; .*at most 128"),
        ("FluxKontextPipeline", (picture(1, *SQUARE).float(),), "of torch.float32"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(
    tiny: Callable[[str], Path], model: str, references: tuple[torch.Tensor, ...], told: str
) -> None:
    engine = Engine(load_pipeline(str(tiny(model))), max_side=128)
    with pytest.raises(RequestError, match=told) as refused:
        engine.submit(Request("a", 0, 4, 1.0, height=64, width=64, references=references))
    assert refused.value.field == "references" and not engine.unfinished


def as_file(pixels: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("height", "width"), [(900, 1300), (1448, 1448), (700, 645), (2500, 2500)])
def test_a_reference_is_fitted_as_the_pipeline_fits_it(height: int, width: int) -> None:
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    noise = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    (fitted,) = read_references([as_file(noise)], 16, 4096).pictures
    theirs = Flux2ImageProcessor._resize_if_exceeds_area(Image.fromarray(noise.numpy()))
    height, width = (side // 16 * 16 for side in reversed(theirs.size))
    expected = Flux2ImageProcessor().preprocess(theirs, height=height, width=width, resize_mode="crop")
    assert torch.equal(fitted, (expected[0] * 127.5 + 127.5).round().to(torch.uint8).permute(1, 2, 0))


def test_a_reference_keeps_to_the_longest_side_and_is_not_scaled_up() -> None:
    wide, small = as_file(picture(1, 160, 480)), as_file(picture(1, 32, 48))
    pictures, size = read_references([wide, small], 16, 128)
    assert [each.shape for each in pictures] == [(32, 128, 3), (32, 48, 3)] and size == (32, 128)
    trained, size = read_references([wide, small], 16, 128, resolution=32)
    assert [each.shape for each in trained] == [(16, 48, 3), (16, 32, 3)] and size == (32, 128)
    for file, told in (
        (as_file(picture(1, 16, 480)), "480x16 pixels; its shorter"),
        (b"GIF89a", "not a pict"),
    ):
        with pytest.raises(APIError, match=f"image: picture 2: {told}"):
            read_references([small, file], 16, 128)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeedbackStore]:
    store = FeedbackStore(open_database(f"sqlite:///{tmp_path_factory.mktemp('feedback') / 'feedback.db'}"))
    yield store
    store.close()


@pytest.fixture(scope="module")
def attentive_model(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attentive")
    plain_diffusers.attentive(plain_diffusers.load(tiny("Flux2KleinPipeline"))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(config: Config, attentive_model: Path, store: FeedbackStore, tmp_path_factory: Any) -> Iterator[str]:
    """An endpoint of a FLUX.2 with two versions."""
    versions = []
    for number in (1, 2):
        folder = tmp_path_factory.mktemp("edits") / str(number)
        write_adapter(attentive_model, folder, number, **VARIANTS["attention"])
        versions.append(
            RegisteredModel(
                "editor",
                number,
                str(folder),
                weights_digest(str(folder)),
                str(attentive_model),
                None,
                "lora",
                {},
                reference_resolution=TRAINED_AT if number == 2 else None,
            )
        )
    serve = {"keys": None, "allow_anonymous": True, "safety_checker": None, "drift_pictures": 0}
    serve |= {"replicas": 64, "max_side": 128, "requests_per_minute": 1000}
    settings = config.model_copy(update={"serve": config.serve.model_copy(update=serve)})
    with page_server(settings, versions[0], versions[1], store) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


TRAINED_AT = 80  # of the second version's references, in pixels
FILES = [as_file(picture(1, 128, 176)), as_file(picture(2, 64, 64))]
OWN: dict[str, Any] = {"seed": 3, "steps": 3, "guidance_scale": 2.0}


def edited(client: openai.OpenAI, files: list[bytes], model: str = "base", **fields: Any) -> Any:
    own = OWN | fields.pop("own", {})
    images: Any = [(f"{number}.png", file) for number, file in enumerate(files)]
    return client.images.edit(image=images, prompt="a red star", model=model, extra_body=own, **fields)


def pixels(data: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(data.b64_json)))))


def test_pictures_of_an_edit_are_references(
    client: openai.OpenAI, url: str, store: FeedbackStore, attentive_model: Path
) -> None:
    """Of which the first gives the size; with a strength, drawing begins with the one picture instead."""
    answers = [edited(client, FILES), edited(client, FILES, size="64x64"), edited(client, FILES[1:])]
    assert [each.size for each in answers] == ["128x80", "64x64", "64x64"]
    begun = edited(client, FILES[1:], size="64x64", own={"strength": 0.5})
    plain = plain_diffusers.load(attentive_model)
    for answer, files in zip(answers, (FILES, FILES, FILES[1:]), strict=True):
        width, height = map(int, answer.size.split("x"))
        request = Request(
            "a red star", 3, 3, 2.0, None, height, width, references=read_references(files, 16, 128).pictures
        )
        assert (pixels(answer.data[0]) - plain_diffusers.draw(plain, request)).abs().max() <= TOLERANCE
    (begin,) = drawn(
        Engine(load_pipeline(str(attentive_model))),
        Request("a red star", 3, 3, 2.0, None, 64, 64, image=read_picture(FILES[1], 64, 64), strength=0.5),
    )
    assert (pixels(begun.data[0]).float() - begin).abs().max() <= 1

    # What is recorded says that it cannot be drawn again from what is recorded.
    store.flush()
    found = store.generations([each.data[0].id for each in (answers[0], begun)])
    assert [(each.num_references, each.strength) for each in found] == [(2, None), (None, 0.5)]
    for generation in found:
        with pytest.raises(Unavailable, match="drawn from pictures that were sent"):
            Replayer(url).draw(generation)
    facts = read_provenance(base64.b64decode(answers[0].data[0].b64_json)) or {}
    assert facts["num_references"] == 2 and "strength" not in facts


def test_a_version_looks_at_references_of_the_size_that_it_was_trained_with(
    client: openai.OpenAI, attentive_model: Path, tmp_path: Path
) -> None:
    """The picture that is drawn has the size of the first one all the same."""
    plain = plain_diffusers.load(attentive_model)
    load_lora(plain, write_adapter(attentive_model, tmp_path / "second", 2, **VARIANTS["attention"]))
    answer = edited(client, FILES, model="editor@2")
    assert answer.size == "128x80"
    for resolution, is_drawn in ((TRAINED_AT, True), (None, False)):
        pictures, size = read_references(FILES, 16, 128, resolution)
        expected = plain_diffusers.draw(
            plain, Request("a red star", 3, 3, 2.0, None, *size, references=pictures)
        )
        difference = (pixels(answer.data[0]) - expected).abs().max()
        assert (difference <= TOLERANCE) == is_drawn, f"{difference} levels"


def test_python_draws_from_paths_files_and_pictures(
    url: str, client: openai.OpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # of its record
    arguments = stage_arguments("photos", recipe="sdxl-lora", fields={"serve": {"port": urlsplit(url).port}})
    endpoint = Endpoint(recorded("editor/endpoint", arguments))
    Path("first.png").write_bytes(FILES[0])
    expected = Image.fromarray(pixels(edited(client, FILES).data[0]).numpy())
    for first in ("first.png", Path("first.png"), FILES[0], Image.open("first.png")):
        [found] = endpoint.draw("a red star", images=[first, FILES[1]], model="base", **OWN)
        assert found.tobytes() == expected.tobytes()
    begun = dict(prompt="a red star", size="96x64", strength=0.5, n=2, **OWN)
    for one in ([FILES[0]], FILES[0], "first.png", Image.open("first.png")):
        drawn_from = endpoint.draw(images=one, **begun)
        assert [each.size for each in drawn_from] == [(96, 64)] * 2
    with pytest.raises(FileNotFoundError, match="missing.png"):
        endpoint.draw("a red star", images=["missing.png"])


def test_an_edit_with_references_is_streamed_in_its_size(client: openai.OpenAI) -> None:
    with edited(client, FILES, stream=True, partial_images=1) as stream:
        assert [(event.type, event.size) for event in stream] == [
            ("image_edit.partial_image", "128x80"),
            ("image_edit.completed", "128x80"),
        ]


def test_models_say_how_many_references_they_take(url: str) -> None:
    assert {each["references"] for each in httpx.get(f"{url}/v1/models").json()["data"]} == {10}
    form = httpx.get(f"{url}/openapi.json").json()["paths"]["/v1/images/edits"]["post"]["requestBody"]
    image = form["content"]["multipart/form-data"]["schema"]["properties"]["image"]
    assert (image["type"], image["items"]["format"]) == ("array", "binary")


def test_a_mask_keeps_the_rest_of_the_first_reference(client: openai.OpenAI, attentive_model: Path) -> None:
    hole = np.full((64, 64, 4), 255, np.uint8)
    hole[8:40, 16:48, 3] = 0
    file = io.BytesIO()
    Image.fromarray(hole).save(file, "PNG")
    answer = edited(client, FILES[::-1], mask=file.getvalue())
    drawn_in, given = pixels(answer.data[0]), picture(2, 64, 64)
    outside = torch.from_numpy(hole[..., 3] != 0)
    assert torch.equal(drawn_in[outside], given[outside])
    (expected,) = drawn(
        Engine(load_pipeline(str(attentive_model))),
        Request(
            *("a red star", 3, 3, 2.0, None, 64, 64),
            image=given,
            masked=torch.cat([given, torch.from_numpy(hole[..., 3:])], dim=2),
            references=read_references(FILES[::-1], 16, 128).pictures,
        ),
    )
    assert (drawn_in.float() - expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("files", "fields", "param", "told"),
    [
        ([b""], {}, "image", "missing; send an image file"),
        (11 * FILES[:1], {}, "image", "11 were sent, and this model takes at most 10"),
        (
            FILES,
            {"own": {"strength": 0.5}},
            "image",
            "2 were sent, and with strength, drawing begins with one",
        ),
        ([FILES[0], b"text"], {}, "image", "picture 2: not a picture in one of PNG, JPEG, WEBP"),
        ([as_file(picture(1, 16, 480))], {}, "image", "480x16 pixels; its shorter side must be at least 16"),
        (FILES, {"mask": b"a mask"}, "mask", "not a readable PNG"),
        (FILES, {"size": "60x60"}, "size", "60; must be a multiple of 16 pixels"),
    ],
)
def test_an_edit_that_cannot_be_drawn_names_its_field(
    client: openai.OpenAI, files: list[bytes], fields: dict[str, Any], param: str, told: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=told) as refused:
        edited(client, files, **fields)
    assert refused.value.param == param


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium on the PATH")
def test_the_page_draws_with_several_pictures_and_copies_programs_that_do(url: str, tmp_path: Path) -> None:
    names = ["the 'first' \\ \"one\".png", "and;a,second.png"]
    for name, content in zip(names, FILES, strict=True):
        (tmp_path / name).write_bytes(content)
    with (
        chromium() as browser,
        opened(browser, url, permissions=["clipboard-read", "clipboard-write"]) as page,
    ):
        page.fill("#steps", "3")
        assert "up to 10 pictures" in page.inner_text("#image-hint")
        page.set_input_files("#image", [tmp_path / name for name in names])
        assert page.get_attribute("#size", "placeholder") == "as the picture"
        assert not page.is_visible("#strength")
        draw(page, "a red star", seed=4)
        assert page.inner_text(".meta").endswith("128\u2009×\u200980")
        shown = page.evaluate(FIRST_PNG)
        for button, command in ((".curl", ["bash", "-ec"]), (".python", [sys.executable, "-c"])):
            page.click(button)
            subprocess.run([*command, copied(page)], cwd=tmp_path, check=True, timeout=60)
            drawn = Image.open(tmp_path / "picture.png")
            assert drawn.tobytes() == Image.open(io.BytesIO(bytes(shown))).tobytes()
            (tmp_path / "picture.png").unlink()
            page.evaluate("document.getElementById('status').textContent = ''")
        page.reload()
        page.click(".reuse")
        assert page.locator("#chosen img").count() == page.locator(".entry .given img").count() == 2
