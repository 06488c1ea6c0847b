"""Base models in their published sizes, without weights: real configurations, which are all a plan reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.tiny_models import clip_tokenizer, t5_tokenizer

BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def stable_diffusion(folder: Path) -> Path:
    """Stable Diffusion 1.5: a UNet of 859,520,964 parameters."""
    unet = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    with torch.device("meta"):
        components = {
            "unet": UNet2DConditionModel(**unet),
            "vae": autoencoder(latent_channels=4, scaling_factor=0.18215, sample_size=512),
            "text_encoder": clip(768, 12),
        }
    components |= {"scheduler": PNDMScheduler(skip_prk_steps=True, **BETAS), "tokenizer": clip_tokenizer()}
    return save(folder, "StableDiffusionPipeline", components)


def stable_diffusion_xl(folder: Path) -> Path:
    """Stable Diffusion XL: a UNet of 2,567,463,684 parameters."""
    unet: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        components = {
            "unet": UNet2DConditionModel(**unet),
            "vae": autoencoder(latent_channels=4, scaling_factor=0.13025, sample_size=1024),
            "text_encoder": clip(768, 12),
            "text_encoder_2": clip(1280, 32, projection=1280),
        }
    components |= {
        "scheduler": EulerDiscreteScheduler(**BETAS),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
    }
    return save(folder, "StableDiffusionXLPipeline", components, force_zeros_for_empty_prompt=True)


def stable_diffusion_3(folder: Path) -> Path:
    """Stable Diffusion 3 Medium: a transformer of 2,028,328,000 parameters."""
    with torch.device("meta"):
        components = {
            "transformer": SD3Transformer2DModel(
                num_layers=24,
                num_attention_heads=24,
                caption_projection_dim=1536,
                pos_embed_max_size=192,
                out_channels=16,
            ),
            "vae": autoencoder(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
            "text_encoder": clip(768, 12, projection=768),
            "text_encoder_2": clip(1280, 32, projection=1280),
            "text_encoder_3": t5_xxl(),
        }
    components |= {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "tokenizer": clip_tokenizer()}
    components |= {"tokenizer_2": clip_tokenizer(), "tokenizer_3": t5_tokenizer()}
    return save(folder, "StableDiffusion3Pipeline", components)


def flux(folder: Path) -> Path:
    """FLUX.1-dev: a transformer of 11,901,408,320 parameters."""
    with torch.device("meta"):
        components = {
            "transformer": FluxTransformer2DModel(guidance_embeds=True),
            "vae": autoencoder(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
            "text_encoder": clip(768, 12),
            "text_encoder_2": t5_xxl(),
        }
    components |= {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
    }
    return save(folder, "FluxPipeline", components)


def autoencoder(*, latent_channels: int, sample_size: int = 1024, **factors: float) -> Any:
    levels = (128, 256, 512, 512)
    return AutoencoderKL(
        block_out_channels=levels,
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        up_block_types=("UpDecoderBlock2D",) * len(levels),
        layers_per_block=2,
        latent_channels=latent_channels,
        sample_size=sample_size,
        **factors,
    )


def clip(width: int, layers: int, projection: int | None = None) -> Any:
    """A text encoder of CLIP's, with heads of 64 channels."""
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=projection or width,
    )
    build: Callable[[CLIPTextConfig], Any] = CLIPTextModelWithProjection if projection else CLIPTextModel
    return build(config)


def t5_xxl() -> Any:
    """T5 1.1 XXL's encoder."""
    config = T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def save(folder: Path, pipeline: str, components: dict[str, Any], **settings: Any) -> Path:
    """Write a pipeline's folder as it is published, without weights."""
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.30.0", **settings}
    for name, component in components.items():
        library = "transformers" if type(component).__module__.startswith("transformers") else "diffusers"
        index[name] = [library, type(component).__name__]
        where = folder / name
        if isinstance(component, CLIPTokenizer | T5TokenizerFast) or name == "scheduler":
            component.save_pretrained(where)
        elif library == "diffusers":
            component.save_config(where)
        else:
            component.config.architectures = [type(component).__name__]
            component.config.save_pretrained(where)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
