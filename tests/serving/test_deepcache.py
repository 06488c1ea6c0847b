"""With kept features every other step is shallow, and a picture still depends on its own request alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.request import Request
from tests.serving.test_adapters import VARIANTS, write_adapter

REQUESTS = [
    Request("a small red circle", 0, 5, 3.0, height=64, width=64),
    Request("a big blue cross", 7, 3, 1.0, height=64, width=64),
    Request("a big blue cross", 7, 4, 7.5, height=48, width=64),
    Request("a big purple square", 2, 3, 2.0, height=64, width=64, adapter="attention"),
]


def drawn_by(engine: Engine, *requests: Request) -> list[torch.Tensor]:
    futures = []
    for request in requests:
        futures.append(engine.submit(request))
        engine.step()  # so that rows are at steps of both kinds
    engine.drain()
    return [future.result(0).pixels.float() for future in futures]


@pytest.mark.parametrize("model", [name for name, family in FAMILIES.items() if family.is_unet])
def test_a_picture_is_the_same_alone_and_in_a_batch(
    tiny: Callable[[str], Path], tmp_path: Path, model: str
) -> None:
    base = tiny(model)
    adapter = write_adapter(base, tmp_path / "adapter", 0, **VARIANTS["attention"])
    engine = Engine(load_pipeline(str(base)), adapter_folder=lambda _: adapter, cache_features=True)
    plain = Engine(load_pipeline(str(base)), adapter_folder=lambda _: adapter)
    together, exact = drawn_by(engine, *REQUESTS), drawn_by(plain, *REQUESTS)
    for request, picture, expected in zip(REQUESTS, together, exact, strict=True):
        (alone,) = drawn_by(engine, request)
        assert (picture - alone).abs().max() <= 1, request
        assert 0 < (picture - expected).abs().mean() < 20, request


def test_every_other_step_leaves_the_deep_blocks_out_and_the_first_does_not(tiny_model: Path) -> None:
    engine = Engine(load_pipeline(str(tiny_model)), cache_features=True)
    deep: list[int] = []
    unet = engine.denoiser
    unet.mid_block.resnets[0].register_forward_hook(lambda *_: deep.append(engine.load().calls))
    drawn_by(engine, Request("a", 0, 5, 3.0))
    assert deep == [0, 2, 4] and engine.load().calls == 5


def test_kept_features_that_are_made_anew_change_nothing(tiny_model: Path) -> None:
    """The whole passes of an engine that keeps features are those of one that does not."""
    request = Request("a small red circle", 0, 1, 3.0)
    engine = Engine(load_pipeline(str(tiny_model)), cache_features=True)
    assert torch.equal(*drawn_by(engine, request), *drawn_by(Engine(load_pipeline(str(tiny_model))), request))
