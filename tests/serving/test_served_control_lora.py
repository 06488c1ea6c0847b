"""Adapters that follow control images draw what diffusers' own pipeline draws, in any batch and over HTTP."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import httpx
import openai
import pytest
import torch
from PIL import Image

from ray_jobs.config import Config
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.registry.digests import weights_digest
from ray_jobs.registry.models import RegisteredModel
from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.request import Request
from tests.controlled import PROMPT, pointed
from tests.serving.endpoint_here import page_of
from tests.serving.test_adapters import VARIANTS, write_adapter
from tests.serving.test_engine import TOLERANCE
from tests.serving.test_served_edits import as_file, picture, pixels
from tests.tiny_models import captions
from tests.unit.test_control_lora import plain, write_control_lora

FLUX = FAMILIES["FluxPipeline"]
SIDE, WIDE = (64, 64), (64, 96)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, two adapters that follow control images, and one that does not."""
    root = tmp_path_factory.mktemp("control")
    pointed(FLUX.tiny(captions())).save_pretrained(root / "base")
    found = {name: write_control_lora(root / "base", root / name, seed) for seed, name in enumerate("ab")}
    plainly = write_adapter(root / "base", root / "style", 1, **VARIANTS["attention"])
    return {"base": root / "base", "style": plainly, **found}


def expected(folders: dict[str, Path], request: Request) -> torch.Tensor:
    """The picture of diffusers' pipelines: float32, height x width x 3, 0 to 255."""
    pipeline: Any = diffusers.FluxPipeline.from_pretrained(folders["base"])
    pipeline.set_progress_bar_config(disable=True)
    given = {}
    if request.adapter:
        pipeline.load_lora_weights(folders[request.adapter])
    if request.control is not None:
        pipeline, given = plain(pipeline), {"control_image": Image.fromarray(request.control.numpy())}
    found = pipeline(
        request.prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
        **given,
    ).images[0]
    return 255 * torch.from_numpy(found)


@pytest.mark.parametrize("family", ["FluxPipeline"])
def test_every_row_of_a_changing_batch_is_that_of_the_plain_pipeline(
    folders: dict[str, Path], family: str
) -> None:
    assert FLUX.pipeline_class == family
    controlled = Request(PROMPT, 0, 3, 3.0, None, *SIDE, control=picture(1, *SIDE), adapter="a")
    mixed = [
        (0, controlled),
        (0, Request("a cat", 7, 3, 2.0, None, *SIDE)),
        (1, replace(controlled, seed=2, control=picture(2, *SIDE), adapter="b")),
        (1, Request(PROMPT, 8, 3, 4.0, None, *WIDE, control=picture(3, *WIDE), adapter="a")),
    ]
    base = load_pipeline(str(folders["base"]))
    assert FLUX.control_channels
    FLUX.control_channels.add_to(base.transformer)
    engine = Engine(base, max_rows=6, num_cores=1, adapter_folder=folders.__getitem__)
    futures = []
    for call in range(2):
        futures += [engine.submit(request) for joins, request in mixed if joins == call]
        engine.step()
    engine.drain()
    for future, (_, request) in zip(futures, mixed, strict=True):
        assert (future.result().pixels.float() - expected(folders, request)).abs().max() < TOLERANCE
    one, other = (expected(folders, replace(controlled, adapter=name)) for name in "ab")
    assert (one - other).abs().mean() > 1
    engine.close()


@contextmanager
def endpoint(config: Config, folders: dict[str, Path], kept: Path, **serve: Any) -> Iterator[str]:
    """An endpoint of an adapter that follows control images, beside a plain one of the same base."""
    edges, style = (
        RegisteredModel(
            "edges",
            number,
            str(folders[name]),
            weights_digest(str(folders[name])),
            str(folders["base"]),
            None,
            "lora",
            {},
            control=name == "a",
        )
        for number, name in enumerate(("a", "style"), start=1)
    )
    with page_of(config, edges, style, kept, **serve) as address:
        yield address


@pytest.fixture(scope="module")
def url(config: Config, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with endpoint(config, folders, tmp_path_factory.mktemp("feedback")) as address:
        yield address


def asked(url: str, **fields: Any) -> Any:
    own = {"seed": 3, "steps": 3, "guidance_scale": 3.0}
    own |= {"control_image": base64.b64encode(as_file(picture(1, *WIDE))).decode()} | fields
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        return client.images.generate(prompt=PROMPT, extra_body=own)


def test_a_request_sends_what_is_to_be_followed(url: str, folders: dict[str, Path]) -> None:
    answer = asked(url)
    assert answer.model == "edges@1" and answer.size == "96x64"  # the control image's
    request = Request(PROMPT, 3, 3, 3.0, None, *WIDE, control=picture(1, *WIDE), adapter="a")
    assert (pixels(answer.data[0]) - expected(folders, request)).abs().max() <= TOLERANCE
    other = asked(url, model="edges@2", control_image=None, size="64x64")
    request = Request(PROMPT, 3, 3, 3.0, None, *SIDE, adapter="style")
    assert (pixels(other.data[0]) - expected(folders, request)).abs().max() <= TOLERANCE
    bare = asked(url, model="base", control_image=None, size="64x64")
    request = replace(request, adapter=None)
    assert (pixels(bare.data[0]) - expected(folders, request)).abs().max() <= TOLERANCE
    offered = {each["id"]: each["control"] for each in httpx.get(f"{url}/v1/models").json()["data"]}
    assert offered["edges@1"] and not offered["edges@2"] and not offered["base"]


def test_a_fused_champion_follows_them_too(config: Config, folders: dict[str, Path], tmp_path: Path) -> None:
    with endpoint(config, folders, tmp_path, fuse_champion=True) as url:
        answer = asked(url)
    request = Request(PROMPT, 3, 3, 3.0, None, *WIDE, control=picture(1, *WIDE), adapter="a")
    assert (pixels(answer.data[0]) - expected(folders, request)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("own", "param", "told"),
    [
        ({"model": "edges@2"}, "control_image", "edges@2 follows none"),
        (
            {"control_scale": 0.5},
            "control_scale",
            "edges@1 is an adapter, and follows control images in full",
        ),
        ({"adapters": [{"name": "edges@2", "scale": 1}]}, "adapters", "edges@1 is an adapter itself"),
        (
            {"control_image": None, "adapters": [{"name": "edges@1", "scale": 1}]},
            "adapters.0.name",
            "follows control images; request it as model",
        ),
    ],
)
def test_what_cannot_be_followed_is_named(url: str, own: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises(openai.BadRequestError, match=told) as refused:
        asked(url, **own)
    assert refused.value.param == param
