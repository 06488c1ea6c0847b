"""The encoders of a model, for each family whose captions can be encoded, and what identifies them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_jobs.config import ConfigError, load_config
from ray_jobs.data.encoding.shapes import picture_shapes
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.weights.encoders import Encoders
from ray_jobs.weights.loading import load_pipeline, read_index
from ray_jobs.weights.model_files import encoders_digest, max_side, model_folder, size_multiple
from serving.engine.rows import Request, check_request

DEMO = "configs/demo.yaml"


def test_stable_diffusion_gives_tokens_and_embeddings(tiny_model: Path) -> None:
    forms = Encoders(str(tiny_model)).encode_captions(["a red circle", ""])
    assert {name: tuple(form.shape) for name, form in forms.items()} == {
        "input_ids": (2, 16),
        "prompt_embeds": (2, 16, 32),
    }


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            "StableDiffusionXLPipeline",
            {"input_ids": 16, "input_ids_2": 16, "prompt_embeds": 16, "pooled_prompt_embeds": 24},
        ),
        (
            "StableDiffusion3Pipeline",
            {
                "input_ids": 16,
                "input_ids_2": 16,
                "input_ids_3": 256,
                "prompt_embeds": 16 + 256,
                "pooled_prompt_embeds": 16 + 24,
            },
        ),
        (
            "StableDiffusion3Pipeline-without-t5",
            {"input_ids": 16, "input_ids_2": 16, "prompt_embeds": 16, "pooled_prompt_embeds": 16 + 24},
        ),
        (
            "FluxPipeline",
            {"input_ids": 16, "input_ids_2": 512, "prompt_embeds": 512, "pooled_prompt_embeds": 32},
        ),
        (
            "ChromaPipeline",
            {"input_ids": 512, "attention_mask": 512, "prompt_embeds": 512, "prompt_mask": 512},
        ),
        (
            "Lumina2Pipeline",
            {"input_ids": 256, "attention_mask": 256, "prompt_embeds": 256, "prompt_mask": 256},
        ),
        ("AuraFlowPipeline", {"input_ids": 256, "attention_mask": 256, "prompt_embeds": 256}),
    ],
)
def test_other_families_give_the_tokens_and_the_embeddings_of_all_their_encoders(
    model: str, expected: dict[str, int], tiny: Callable[[str], Path]
) -> None:
    forms = Encoders(str(tiny(model))).encode_captions(["a red circle", "a blue cross"])
    assert {name: form.shape[1] for name, form in forms.items()} == expected
    for name, form in forms.items():
        assert len(form) == 2
        dtypes = {"input": torch.int32, "prompt_mask": torch.bool, "attention_mask": torch.bool}
        assert form.dtype == dtypes.get(name, dtypes.get(name.partition("_")[0], torch.float32))


def test_the_posterior_of_a_picture_is_that_of_the_autoencoder(tiny_model: Path) -> None:
    from diffusers import AutoencoderKL

    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 48, 3), dtype=np.uint8)
    mean, logvar = Encoders(str(tiny_model)).encode_pictures(pixels)
    assert mean.shape == logvar.shape == (3, 4, 8, 6)
    autoencoder = AutoencoderKL.from_pretrained(tiny_model, subfolder="vae")
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = autoencoder.encode(pictures).latent_dist
    assert torch.allclose(mean, posterior.mean, atol=1e-4)
    assert torch.allclose(logvar, posterior.logvar, atol=1e-4)


def test_an_encoder_without_a_posterior_gives_the_same_latents_whatever_is_drawn(
    tiny: Callable[[str], Path],
) -> None:
    folder = tiny("SanaPipeline")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    encoders = Encoders(str(folder))
    autoencoder, codec = encoders.pipeline.vae, encoders.family.codec
    mean, logvar = encoders.encode_pictures(pixels)
    with torch.no_grad():
        expected = autoencoder.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent
    for stored in (logvar, logvar.bfloat16().float()):
        for noise in (torch.zeros(mean.shape), torch.full(mean.shape, 9.0)):
            drawn = codec.sample(mean, stored, codec.scale(autoencoder), noise)
            assert torch.allclose(drawn, 0.41407 * expected, atol=1e-5)


def test_latents_are_drawn_from_the_posterior_and_scaled() -> None:
    mean, logvar = torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1, 2), 2 * np.log(0.5))
    scale = torch.tensor([1.0]), torch.tensor([2.0])
    drawn = Codec().sample(mean, logvar, scale, torch.tensor([[[[0.0, -1.0]]]]))
    assert drawn.flatten().tolist() == pytest.approx([(3 - 1) * 2, (3 - 0.5 - 1) * 2])


def test_the_digest_changes_with_the_encoders_and_not_with_the_denoiser(
    tiny_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    before = encoders_digest(str(tiny_model))
    assert encoders_digest(str(copy)) == before
    shutil.rmtree(copy / "unet")
    assert encoders_digest(str(copy)) == before
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    assert encoders_digest(str(copy)) != before


@pytest.mark.parametrize(
    ("model", "multiple", "limit"),
    [
        ("StableDiffusionPipeline", 8, None),
        ("StableDiffusionXLPipeline", 8, None),
        ("StableDiffusion3Pipeline", 16, 128),
        ("ChromaPipeline", 16, None),
        ("SanaPipeline", 32, None),
        ("Lumina2Pipeline", 16, 64 * 16),
        ("AuraFlowPipeline", 16, 8 * 16),
        ("PixArtSigmaPipeline", 16, None),
        (
            "FluxPipeline",
            16,
            None,
        ),  # its configuration says patch_size 1: packing lies outside the transformer
    ],
)
def test_sides_fit_the_family(
    model: str, multiple: int, limit: int | None, tiny: Callable[[str], Path]
) -> None:
    base = str(tiny(model))
    assert (size_multiple(base), max_side(base)) == (multiple, limit)
    for settings in (["data.resolution=64"], ["data.resolution=64", "data.buckets=true"]):
        config = load_config(DEMO, [f"model.base={base}", *settings])
        sides = {side for shape in picture_shapes(config) for side in shape}
        assert all(side % multiple == 0 for side in sides)
    pipeline = load_pipeline(base, without=family_of(read_index(base)["_class_name"]).text.encoders)
    for side in (multiple // 2, 64 - multiple // 2, (limit or 512) + multiple):
        with pytest.raises(ValueError, match=f"^height: {side}; "):
            check_request(Request("", 0, 2, 1.0), (side, 64), pipeline, with_adapters=False, max_side=512)


def test_pictures_larger_than_the_positions_of_a_model_are_refused(tiny_sd3: Path) -> None:
    for settings, field in (
        (["data.resolution=144"], "data.resolution"),
        (["data.resolution=128", "data.buckets=true"], "data.bucket_max_aspect_ratio"),
    ):
        config = load_config(DEMO, [f"model.base={tiny_sd3}", *settings])
        with pytest.raises(ConfigError, match=rf"^{field}: .* supports at most 128; lower it$"):
            picture_shapes(config)
    with pytest.raises(ConfigError, match=r"data\.resolution: 72 is not a multiple of 16"):
        picture_shapes(load_config(DEMO, [f"model.base={tiny_sd3}", "data.resolution=72"]))


def test_what_is_no_model_is_named(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="it has no model_index.json"):
        model_folder(str(tmp_path))
    with pytest.raises(ValueError, match="./nowhere: not a model in diffusers' format"):
        model_folder("./nowhere")
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "DDPMPipeline"}))
    with pytest.raises(ValueError, match="model.base: .*DDPMPipeline is not supported, only"):
        Encoders(str(copy))
