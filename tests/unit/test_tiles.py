"""Large pictures are encoded and decoded in tiles and a few at a time, all others as before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_jobs.config import Config
from ray_jobs.data.encoding.encoding import EncodeRows
from ray_jobs.diffusion import memory
from ray_jobs.diffusion.families import codec, family_of
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.diffusion.sampling import decode_latents, encode_pictures, sample_pictures
from ray_jobs.planning.inference import LiveBytes, needs
from ray_jobs.weights.loading import load_pipeline
from serving.engine.optimizations import prepare
from tests.tiny_models import FAMILY_MODELS

ROOT = Path(__file__).parents[2]


def a_config(base: Path, side: int, **data: object) -> Config:
    return Config.model_validate(
        {
            "name": "tiled",
            "data": {"source": "pictures", "resolution": side, **data},
            "model": {"base": str(base)},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
        }
    )


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pictures above 64 x 64 pixels large ones."""
    for name, size in {"WHOLE": 64 * 64, "TILE": 64, "OVERLAP": 32}.items():
        monkeypatch.setattr(codec, name, size)


def passed_through(pipeline: Pipeline, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return latents and decoded pixels, and the most bytes that lived while encoding and decoding."""
    facet, most = family_of(pipeline).codec, []
    shape = facet.shape(pipeline.vae.config, *pixels.shape[-2:])
    noise = torch.zeros(1, *facet.unpacked_shape(shape))
    with LiveBytes([pipeline.vae]) as live:
        latents = encode_pictures(pipeline, pixels, noise)
    most.append(live.most)
    with LiveBytes([pipeline.vae]) as live:
        decoded = decode_latents(pipeline, latents)
    return latents, decoded, [*most, live.most]


def a_picture(height: int, width: int) -> torch.Tensor:
    """Return a picture without noise, which a small autoencoder would not restore: uint8, 1 x 3 x H x W."""
    coarse = torch.rand(1, 3, height // 32, width // 32, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return (255 * smooth.clamp(0, 1)).to(torch.uint8)


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_every_familys_large_pictures_take_the_memory_of_a_tile(
    tiny: Callable[[str], Path], model: str, request: pytest.FixtureRequest
) -> None:
    pipeline = load_pipeline(str(tiny(model)))
    small, large = a_picture(64, 64), a_picture(192, 256)
    whole = [passed_through(pipeline, each) for each in (small, large)]
    request.getfixturevalue("small_tiles")
    tiled = [passed_through(pipeline, each) for each in (small, large)]
    for before, after in zip(whole, tiled, strict=True):
        assert [each.shape for each in before[:2]] == [each.shape for each in after[:2]]
    assert all(torch.equal(one, other) for one, other in zip(whole[0][:2], tiled[0][:2], strict=True))
    assert not torch.equal(whole[1][1], tiled[1][1])
    assert all(2 * after < before for before, after in zip(whole[1][2], tiled[1][2], strict=True))
    assert not pipeline.vae.use_tiling  # others' pictures are whole at the same time


def test_the_plan_counts_the_tiles_of_what_is_decoded_and_the_whole_of_what_is_trained_on(
    tiny_model: Path, small_tiles: None
) -> None:
    encoder, evaluator, replica = needs(a_config(tiny_model, 192))
    pipeline = load_pipeline(str(tiny_model))
    facet, pictures = family_of(pipeline).codec, a_picture(192, 192)
    *_, (_, decoding) = passed_through(pipeline, pictures)
    assert evaluator.picture["decoding"] == replica.picture["decoding"]
    assert evaluator.picture["decoding"] == pytest.approx(decoding, rel=0.02)
    with torch.no_grad(), LiveBytes([pipeline.vae]) as live:
        facet.posterior(pipeline.vae, pictures / 127.5 - 1)
    assert encoder.picture["encoding"] == pytest.approx(live.most, rel=0.05)


def test_an_autoencoder_that_is_kept_away_from_the_device_works_in_tiles(
    tiny_model: Path, small_tiles: None
) -> None:
    here, away = (load_pipeline(str(tiny_model)) for _ in range(2))
    prepare(away, "cpu", offload="model")
    for weight in here.vae.parameters():  # how a CPU rounds depends on where weights begin
        weight.data = weight.data.clone()
    latents = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decode_latents(here, latents), decode_latents(away, latents))


def test_training_pictures_are_encoded_whole_and_a_few_at_a_time(
    tiny_model: Path, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PIXELS_AT_ONCE", 2 * 96 * 64)
    encoder, seen = EncodeRows(a_config(tiny_model, 64)), list[torch.Size]()
    encoder.encoders.pipeline.vae.encoder.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (5, 96, 64, 3), dtype=np.uint8)
    together = encoder.encode(pixels, ["a small red circle"] * 5)["latents_mean"]
    assert seen == [(2, 3, 96, 64), (2, 3, 96, 64), (1, 3, 96, 64)]
    for number in range(5):
        alone = encoder.encode(pixels[number : number + 1], ["a small red circle"])["latents_mean"]
        assert torch.allclose(together[number].float(), alone[0].float(), rtol=1e-2, atol=1e-3)


def test_pictures_are_decoded_a_few_at_a_time_and_are_those_of_all_at_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(str(tiny_model))

    def drawn() -> list[torch.Tensor]:
        prompts, shapes = ["a small red circle"] * 5, [(64, 64)] * 5
        options: dict[str, Any] = {"num_steps": 2, "guidance_scale": 2.0, "batch_size": 5}
        return [*sample_pictures(pipeline, prompts, range(5), shapes=shapes, **options)]

    [expected] = drawn()
    monkeypatch.setattr(memory, "PIXELS_AT_ONCE", 2 * 64 * 64)
    parts = drawn()
    assert [len(part) for part in parts] == [2, 2, 1]
    assert (torch.cat(parts).float() - expected.float()).abs().max() <= 1


def test_tiles_change_the_demonstration_models_pictures_by_two_levels_and_are_no_further_from_the_original(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a quarter of the sides of real images and tiles, to take seconds."""
    for name, size in {"WHOLE": 256 * 256, "TILE": 256, "OVERLAP": 64}.items():
        monkeypatch.setattr(codec, name, size)
    pipeline = load_pipeline(str(ROOT / "models" / "emoji-base"))
    facet = family_of(pipeline).codec
    sheet = Image.open(ROOT / "docs" / "demo.png").convert("RGB")
    sheet = sheet.resize((512, 512), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(sheet)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents, _ = facet.posterior(pipeline.vae, pixels)
        whole, tiled = (
            facet.decode(autoencoder, latents).clamp(-1, 1)
            for autoencoder in (pipeline.vae, facet.in_tiles(pipeline.vae, 512, 512))
        )
    levels = [
        127.5 * (one - other).abs().mean().item()
        for one, other in ((whole, tiled), (whole, pixels), (tiled, pixels))
    ]
    assert levels == pytest.approx([1.75, 6.30, 5.89], rel=0.05)
