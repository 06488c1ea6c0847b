"""What a ControlNet steers is the picture of diffusers' own pipeline, in any batch and over HTTP."""

import base64
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import openai
import pytest
import torch
from PIL import Image

from ray_jobs.config import Config
from ray_jobs.diffusion.families import FAMILIES, Family, family_of
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.registry.digests import weights_digest
from ray_jobs.registry.models import RegisteredModel
from ray_jobs.weights.controlnets import save_controlnet
from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.engine.rows import Drawing
from serving.provenance import read_provenance
from serving.request import Request, RequestError
from tests.controlled import PROMPT
from tests.serving.endpoint_here import page_of
from tests.serving.test_adapters import VARIANTS, write_adapter
from tests.serving.test_engine import TOLERANCE
from tests.serving.test_served_edits import as_file, picture, pixels
from tests.unit.test_control import FAMILIES_WITH_CONTROL, controlled, small_base

SQUARE, WIDE = (64, 64), (64, 96)

# By when they join: rows that are steered, as much and less and not at all, and plain ones.
MIXED = [
    (0, Request(PROMPT, 0, 4, 3.0, None, *SQUARE, control=picture(1, *SQUARE))),
    (0, Request("a cat", 7, 3, 2.0, None, *SQUARE)),
    (1, Request("a cat", 7, 4, 1.0, None, *SQUARE, control=picture(2, *SQUARE), control_scale=0.4)),
    (1, Request(PROMPT, 8, 3, 4.0, None, *WIDE, control=picture(3, *WIDE))),
    (2, Request(PROMPT, 9, 3, 4.0, None, *SQUARE, control=picture(3, *SQUARE), control_scale=0.0)),
]


def plain(base: Pipeline, pipeline: Pipeline, request: Request) -> torch.Tensor:
    """The picture of diffusers' pipelines: float32, height x width x 3, 0 to 255."""
    control, options = family_of(base).control, dict[str, Any]()
    assert control
    steered = request.control is not None and request.control_scale > 0
    if steered and request.control is not None:
        options = {control.image_argument: Image.fromarray(request.control.numpy())}
        options["controlnet_conditioning_scale"] = request.control_scale
    found = cast(Any, pipeline if steered else base)(
        request.prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
        **options,
    ).images[0]
    return 255 * torch.from_numpy(found)


@pytest.mark.parametrize("family", FAMILIES_WITH_CONTROL)
def test_every_steered_row_of_a_changing_batch_is_that_of_the_plain_pipeline(family: Family) -> None:
    base = small_base(family)
    pipeline = controlled(family, base)
    expected = [plain(base, pipeline, request) for _, request in MIXED]
    engine = Engine(pipeline, max_rows=6, num_cores=2)
    futures: list[Future[Drawing]] = []
    for call in range(3):
        futures += [engine.submit(request) for joins, request in MIXED if joins == call]
        engine.step()
    engine.drain()
    for future, picture_ in zip(futures, expected, strict=True):
        assert (future.result().pixels.float() - picture_).abs().max() < TOLERANCE
    engine.close()
    off = (expected[4], plain(base, pipeline, replace(MIXED[4][1], control=None)))
    assert torch.equal(*off)
    assert (expected[4] - plain(base, pipeline, replace(MIXED[4][1], control_scale=1.0))).abs().mean() > 2


def test_a_control_image_is_refused_where_it_would_do_nothing() -> None:
    family = FAMILIES["StableDiffusionPipeline"]
    base = small_base(family)
    plain_request = Request(PROMPT, 0, 2, 1.0, None, *SQUARE)
    engine = Engine(base, num_cores=1)
    with pytest.raises(RequestError, match="control: given; this model follows none"):
        engine.submit(replace(plain_request, control=picture(1, *SQUARE)))
    engine.close()
    engine = Engine(controlled(family, base), num_cores=1)
    with pytest.raises(RequestError, match=r"control: \(64, 96, 3\) of torch.uint8; uint8, 64 x 64 x 3"):
        engine.submit(replace(plain_request, control=picture(1, *WIDE)))
    with pytest.raises(RequestError, match=r"control_scale: 0.5; needs a control image"):
        engine.submit(replace(plain_request, control_scale=0.5))
    with pytest.raises(RequestError, match=r"control_scale: -1; must be at least 0"):
        engine.submit(replace(plain_request, control=picture(1, *SQUARE), control_scale=-1))
    engine.close()
    with pytest.raises(ValueError, match="cache_features: a ControlNet changes"):
        Engine(controlled(family, base), num_cores=1, cache_features=True)


@pytest.fixture(scope="module")
def url(config: Config, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An endpoint of a ControlNet, beside a LoRA of the same base."""
    folder = tmp_path_factory.mktemp("control")
    family = FAMILIES["StableDiffusionPipeline"]
    network = controlled(family, load_pipeline(str(tiny_model))).controlnet
    save_controlnet(network, "net", {}, folder / "1")
    write_adapter(tiny_model, folder / "2", 1, **VARIANTS["attention"])
    weights = [str(folder / name) for name in ("1", "2")]
    edges, style = (
        RegisteredModel("edges", number, each, weights_digest(each), str(tiny_model), None, method, {})
        for number, (each, method) in enumerate(zip(weights, ("controlnet", "lora"), strict=True), start=1)
    )
    with page_of(config, edges, style, folder) as address:
        yield address


OWN = {"seed": 3, "steps": 3, "guidance_scale": 3.0}
EDGES = picture(1, *WIDE)


def asked(url: str, **fields: Any) -> Any:
    own = OWN | {"control_image": base64.b64encode(as_file(EDGES)).decode()} | fields.pop("own", {})
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        return client.images.generate(prompt=PROMPT, extra_body=own, **fields)


def test_a_request_sends_what_the_control_net_is_to_follow(url: str, tiny_model: Path) -> None:
    answer, half, plain_answer = (
        asked(url, own=each)
        for each in ({}, {"control_scale": 0.5}, {"control_image": None, "control_scale": None})
    )
    assert answer.size == "96x64"  # the control image's
    pipeline = load_pipeline(str(tiny_model))
    steered = controlled(FAMILIES["StableDiffusionPipeline"], pipeline)
    request = Request(PROMPT, 3, 3, 3.0, None, *WIDE, control=EDGES)
    for found, expected in (
        (answer, request),
        (half, replace(request, control_scale=0.5)),
        (plain_answer, replace(request, control=None, height=64, width=64)),
    ):
        difference = pixels(found.data[0]) - plain(pipeline, steered, expected)
        assert difference.abs().max() <= TOLERANCE
    data_url = f"data:image/png;base64,{base64.b64encode(as_file(EDGES)).decode()}"
    again = asked(url, own={"control_image": data_url})
    assert torch.equal(pixels(again.data[0]), pixels(answer.data[0]))
    form = {"prompt": PROMPT, "strength": 0.5, "size": "96x64", **OWN}
    files = {"image": as_file(picture(2, *WIDE)), "control_image": as_file(EDGES)}
    begun = [
        httpx.post(f"{url}/v1/images/edits", data=form, files=each, timeout=60).raise_for_status().json()
        for each in (files, {"image": files["image"]})
    ]
    with_control, without = (pixels(SimpleNamespace(**each["data"][0])).float() for each in begun)
    assert (with_control - without).abs().mean() > 1
    offered = {each["id"]: each["control"] for each in httpx.get(f"{url}/v1/models").json()["data"]}
    assert offered["edges@1"] and not offered["edges@2"] and not offered["base"]
    facts = read_provenance(base64.b64decode(half.data[0].b64_json)) or {}
    assert facts["control_scale"] == 0.5


def test_a_control_net_and_adapters_draw_together(url: str) -> None:
    chosen = {"adapters": [{"name": "edges@2", "scale": 0.7}], "seed": 3}
    both, alone = asked(url, own=chosen), asked(url)
    assert both.model == "edges@1" and both.size == "96x64"
    off = asked(url, own={"adapters": [{"name": "edges@2", "scale": 0.0}]})
    assert torch.equal(pixels(off.data[0]), pixels(alone.data[0]))
    assert (pixels(both.data[0]).float() - pixels(alone.data[0]).float()).abs().mean() > 1


@pytest.mark.parametrize(
    ("own", "param", "told"),
    [
        ({"model": "base"}, "control_image", "base follows none; GET /v1/models says which"),
        ({"model": "edges@2"}, "control_image", "edges@2 follows none"),
        ({"control_image": "#"}, "control_image", "must be base64"),
        ({"control_image": "R0lGODlh"}, "control_image", "not a picture in one of PNG, JPEG, WEBP"),
        ({"control_scale": 3}, "control_scale", "less than or equal to 2"),
        ({"control_image": None, "control_scale": 1}, "control_scale", "needs control_image"),
    ],
)
def test_what_cannot_be_followed_is_named(url: str, own: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises(openai.BadRequestError, match=told) as refused:
        asked(url, own=own)
    assert refused.value.param == param
