"""Several adapters in one request: the picture is that of diffusers after `set_adapters` in that order."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.diffusion.families import family_of
from ray_jobs.weights.loading import LORA_WEIGHTS, load_pipeline
from serving.engine.adapters import read_adapter
from serving.engine.engine import Engine
from serving.request import Mixture, Request, RequestError, ScaledAdapter
from tests.serving import plain_diffusers
from tests.serving.test_adapters import TOLERANCE, VARIANTS, parts_of, write_adapter, write_variants
from tests.tiny_models import FAMILY_MODELS

MIXTURES: list[Mixture] = [
    (ScaledAdapter("attention", 0.5),),
    (ScaledAdapter("dora", 0.3),),
    (ScaledAdapter("dora", -1.5),),
    (ScaledAdapter("attention", 0.7), ScaledAdapter("dora", 0.6)),
    (ScaledAdapter("dora", 0.6), ScaledAdapter("attention", 0.7)),
    (ScaledAdapter("text", 1.2), ScaledAdapter("scaled", -0.4), ScaledAdapter("rslora", 0.9)),
    (
        ScaledAdapter("convolutions", 0.8),
        ScaledAdapter("dora of convolutions", 1.3),
        ScaledAdapter("dora", 0.5),
        ScaledAdapter("rslora", 2.0),
    ),
    (ScaledAdapter("attention", 0.0), ScaledAdapter("scaled", 1.0)),
    (ScaledAdapter("dora", 0.0),),
]


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_variants(tiny_model, tmp_path_factory.mktemp("adapters"))


def plain_with(model: Path, mixture: Mixture, adapters: dict[str, Path]) -> Any:
    """diffusers' pipeline with a mixture, whose adapters of scale 0 are left out."""
    pipeline, active = plain_diffusers.load(model), [each for each in mixture if each.scale]
    for each in active:
        pipeline.load_lora_weights(
            str(adapters[each.name]), weight_name=LORA_WEIGHTS, adapter_name=_in_peft(each.name)
        )
    if active:
        names = [_in_peft(each.name) for each in active]
        pipeline.set_adapters(names, [each.scale for each in active])
    return pipeline


def _in_peft(name: str) -> str:
    """A name that may be part of a module's."""
    return re.sub(r"\W", "_", name)


@pytest.mark.parametrize("num_cores", [None, 2])
def test_a_batch_mixes_mixtures_single_adapters_and_none(
    tiny_model: Path, adapters: dict[str, Path], num_cores: int | None
) -> None:
    engine = Engine(
        load_pipeline(str(tiny_model)), max_rows=16, adapter_folder=adapters.__getitem__, num_cores=num_cores
    )
    requests = [
        Request("a small red circle", 5, 2 + place % 3, 1.0 + 2 * (place % 2), adapters=mixture)
        for place, mixture in enumerate([(), *MIXTURES])
    ]
    requests.append(Request("a small red circle", 5, 2, 3.0, adapter="attention"))
    futures = [engine.submit(request) for request in requests]
    engine.drain()
    drawn = [future.result(0).pixels.float() for future in futures]
    for request, pixels in zip(requests, drawn, strict=True):
        expected = plain_diffusers.draw(plain_with(tiny_model, request.mixture, adapters), request)
        assert (pixels - expected).abs().max() <= TOLERANCE, request
        assert not request.mixture or (pixels - drawn[0]).abs().max() > 2, request


@pytest.mark.parametrize("model", [name for name in FAMILY_MODELS if name != "StableDiffusionPipeline"])
def test_every_family_mixes_an_adapter_and_a_dora_in_their_order(
    tiny: Callable[[str], Path], tmp_path: Path, model: str
) -> None:
    folder, names = tiny(model), ["text", "dora"]
    for seed, name in enumerate(names):
        write_adapter(folder, tmp_path / name, seed, **VARIANTS[name])
    engine = Engine(load_pipeline(str(folder)), adapter_folder=lambda name: tmp_path / name)
    orders = [tuple(ScaledAdapter(name, 0.7) for name in order) for order in (names, names[::-1])]
    scale = 3.0 if family_of(engine.pipeline).has_guidance(engine.pipeline.config) else 1.0
    requests = [
        Request("a small red circle", 5, 2, scale, height=64, width=64, adapters=order) for order in orders
    ]
    futures = [engine.submit(request) for request in requests]
    engine.drain()
    first, second = (future.result(0).pixels for future in futures)
    assert not torch.equal(first, second)
    if not family_of(engine.pipeline).has_lora_loader:
        return  # nothing of diffusers loads two
    for request, future in zip(requests, futures, strict=True):
        plain = plain_with(folder, request.mixture, {name: tmp_path / name for name in names})
        expected = plain_diffusers.draw(plain, request)
        assert (future.result(0).pixels - expected).abs().max() <= TOLERANCE, request


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"adapters": (ScaledAdapter("a"), ScaledAdapter("b"), ScaledAdapter("a", 0.5))},
            "'a' is listed twice",
        ),
        ({"adapters": (ScaledAdapter("a", float("nan")),)}, "'a' has the scale nan"),
        ({"adapters": (ScaledAdapter("a"),), "adapter": "b"}, "beside adapter 'b'"),
    ],
)
def test_what_is_no_mixture_is_refused(tiny_model: Path, fields: dict[str, Any], reason: str) -> None:
    engine = Engine(load_pipeline(str(tiny_model)), adapter_folder=Path)
    with pytest.raises(RequestError, match=reason) as refused:
        engine.submit(Request("a", 0, 1, 1.0, **fields))
    assert refused.value.field == "adapters"
    bare = Engine(engine.pipeline)
    with pytest.raises(RequestError, match="served without adapters"):
        bare.submit(Request("a", 0, 1, 1.0, adapters=(ScaledAdapter("a"),)))


def test_a_mixture_is_made_of_the_adapters_in_memory_and_counts_among_their_bytes(
    tiny_model: Path, adapters: dict[str, Path]
) -> None:
    pipeline = load_pipeline(str(tiny_model))
    sizes = {
        name: read_adapter(name, adapters[name], parts_of(pipeline)).num_bytes for name in ("dora", "text")
    }
    read: list[str] = []

    def folder(name: str) -> Path:
        read.append(name)
        return adapters[name]

    engine = Engine(pipeline, adapter_folder=folder, adapter_bytes=2 * sum(sizes.values()))
    for scale in (0.1, 0.2, 0.3):
        mixture = (ScaledAdapter("dora", scale), ScaledAdapter("text", scale))
        engine.submit(Request("a", 0, 1, 1.0, adapters=mixture))
        engine.submit(Request("a", 0, 1, 1.0, adapter="text"))
        engine.drain()
        assert engine.load().adapter_bytes <= 2 * sum(sizes.values())
    assert sorted(read) == ["dora", "text"]
    small = Engine(pipeline, adapter_folder=folder, adapter_bytes=max(sizes.values()))
    future = small.submit(Request("a", 0, 1, 1.0, adapters=mixture))
    small.drain()
    with pytest.raises(ValueError, match=r"adapter: 'dora x 0.3 \+ text x 0.3' takes .* more than the"):
        future.result(0)
