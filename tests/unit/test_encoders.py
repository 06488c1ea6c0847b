"""The encoders of a model, for each family whose captions can be encoded, and what identifies them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_jobs.diffusion.encoders import Encoders
from ray_jobs.diffusion.model_files import encoders_digest, model_folder, size_multiple
from ray_jobs.diffusion.objectives import sample_posterior
from tests.conftest import captions


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionXLPipeline with two text encoders, random weights, in diffusers' format."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from ray_jobs.diffusion import architecture

    torch.manual_seed(0)
    tokenizer = architecture.build_tokenizer(captions(), vocabulary=600, max_tokens=16)

    def text(width: int) -> Any:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=24,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    folder = tmp_path_factory.mktemp("tiny-xl")
    StableDiffusionXLPipeline(
        vae=architecture.build_autoencoder([8, 16, 16, 16], latent_channels=4, resolution=64),
        text_encoder=CLIPTextModel(text(32)),
        text_encoder_2=CLIPTextModelWithProjection(text(48)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=80,
            attention_head_dim=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=72,
        ),
        scheduler=EulerDiscreteScheduler(),
    ).save_pretrained(folder)
    return folder


def test_stable_diffusion_gives_tokens_and_embeddings(tiny_model: Path) -> None:
    forms = Encoders(str(tiny_model)).encode_captions(["a red circle", ""])
    assert {name: tuple(form.shape) for name, form in forms.items()} == {
        "input_ids": (2, 16),
        "prompt_embeds": (2, 16, 32),
    }


def test_stable_diffusion_xl_gives_both_encoders_embeddings_and_the_pooled_one(tiny_xl: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    forms = Encoders(str(tiny_xl)).encode_captions(["a red circle", "a blue cross"])
    assert forms["prompt_embeds"].shape == (2, 16, 32 + 48)
    assert forms["pooled_prompt_embeds"].shape == (2, 24)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_xl)
    embeds, _, pooled, _ = pipeline.encode_prompt(["a blue cross"], do_classifier_free_guidance=False)
    assert torch.allclose(forms["prompt_embeds"][1:], embeds, atol=1e-5)
    assert torch.allclose(forms["pooled_prompt_embeds"][1:], pooled, atol=1e-5)


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


def test_latents_are_drawn_anew_and_scaled() -> None:
    mean, logvar = torch.full((4, 1, 64, 64), 3.0), torch.full((4, 1, 64, 64), 2 * np.log(0.5))
    config = {"scaling_factor": 2.0, "shift_factor": 1.0}
    generator = torch.Generator().manual_seed(0)
    one, other = (sample_posterior(mean, logvar, config, generator) for _ in range(2))
    assert one.mean().item() == pytest.approx((3 - 1) * 2, abs=0.05)
    assert one.std().item() == pytest.approx(0.5 * 2, abs=0.02)
    assert not torch.equal(one, other)


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


def test_sides_are_multiples_of_the_autoencoder_and_the_patches(tiny_model: Path, tmp_path: Path) -> None:
    assert size_multiple(str(tiny_model)) == 8
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    (copy / "transformer").mkdir()
    (copy / "transformer" / "config.json").write_text('{"patch_size": 2}')
    assert size_multiple(str(copy)) == 16


def test_what_is_no_model_is_named(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="it has no model_index.json"):
        model_folder(str(tmp_path))
    with pytest.raises(ValueError, match="./nowhere: no model in diffusers' format"):
        model_folder("./nowhere")
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "DDPMPipeline"}))
    with pytest.raises(ValueError, match="model.base: .*DDPMPipeline is none of"):
        Encoders(str(copy))
