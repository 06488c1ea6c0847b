"""A row that looks at reference pictures is the picture of the family's own pipeline, in any batch."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.weights.loading import load_lora, load_pipeline
from serving.engine.engine import Engine
from serving.engine.rows import Drawing
from serving.request import Request, RequestError
from tests.serving import plain_diffusers
from tests.serving.test_adapters import VARIANTS, write_adapter
from tests.serving.test_engine import TOLERANCE, drawn, steps_of
from tests.tiny_models import BY_NAME, MODELS

EDITORS = [name for name in MODELS if BY_NAME[name][0].max_references]
SQUARE, WIDE = (64, 64), (64, 96)


def picture(seed: int, height: int, width: int) -> torch.Tensor:
    """A picture of broad bands: uint8, height x width x 3."""
    colours = torch.rand((height // 16, width // 16, 3), generator=torch.Generator().manual_seed(seed))
    return (255 * colours).to(torch.uint8).repeat_interleave(16, 0).repeat_interleave(16, 1)


def looking(*pictures: tuple[int, int, int]) -> dict[str, Any]:
    return {"references": tuple(picture(*each) for each in pictures)}


def attentive(pipeline: Any) -> Any:
    """A pipeline with larger weights: random ones are so small that no picture looked at would be seen."""
    with torch.no_grad():
        pipeline.vae.encoder.conv_out.weight *= 10
        for weight in pipeline.transformer.parameters():
            weight *= 2 if weight.ndim == 2 else 1
    return pipeline


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
    adapter = write_adapter(folder, tmp_path / "changed", 0, **VARIANTS["attention"])
    pipeline = attentive(load_pipeline(str(folder)))
    engine = Engine(pipeline, max_rows=6, num_cores=2, adapter_folder=lambda _: adapter)
    requests = [each for each in MIXED if len(each[1].references) <= family.max_references]
    if engine.guidance_embedded:
        requests = [(call, replace(request, negative_prompt=None)) for call, request in requests]
    futures: list[Future[Drawing]] = []
    for call in range(4):
        futures += [engine.submit(request) for when, request in requests if when == call]
        engine.step()
    engine.drain()
    pictures = [future.result(0).pixels for future in futures] + drawn(engine, requests[0][1])
    plain = {name: attentive(plain_diffusers.load(folder)) for name in (None, "changed")}
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


def test_an_initial_image_and_references_go_together(tiny: Callable[[str], Path]) -> None:
    engine = Engine(attentive(load_pipeline(str(tiny("FluxKontextPipeline")))))
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
