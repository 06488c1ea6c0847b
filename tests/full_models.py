"""Base models in their published sizes, without weights: real configurations, which are all a plan reads."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    HiDreamImageTransformer2DModel,
    Ideogram4Transformer2DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
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


def flux(folder: Path, pipeline: str = "FluxPipeline") -> Path:
    """FLUX.1-dev: a transformer of 11,901,408,320 parameters; and so has FLUX.1 Kontext."""
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
    return save(folder, pipeline, components)


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
    modular = pipeline.endswith("ModularPipeline")
    if modular:
        index["_blocks_class_name"] = getattr(diffusers, pipeline).default_blocks_name
    for name, component in components.items():
        library = "transformers" if type(component).__module__.startswith("transformers") else "diffusers"
        index[name] = kind = [library, type(component).__name__]
        if modular:
            place = {"pretrained_model_name_or_path": "org/model", "subfolder": name}
            index[name] = [*kind, {"type_hint": kind, **place}]
        where = folder / name
        if isinstance(component, CLIPTokenizer | T5TokenizerFast) or name == "scheduler":
            component.save_pretrained(where)
        elif library == "diffusers":
            component.save_config(where)
        else:
            component.config.architectures = [type(component).__name__]
            component.config.save_pretrained(where)
    (folder / ("modular_model_index.json" if modular else "model_index.json")).write_text(json.dumps(index))
    return folder


class Published(NamedTuple):
    """A published model: its denoiser, with billions of parameters, and its LoRA layers by default."""

    pipeline: str
    denoiser: Callable[..., Any]
    switches: dict[str, Any]
    billions: float
    lora_layers: int
    vae: Callable[[], Any] = lambda: autoencoder(
        latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159
    )


def klein(**switches: Any) -> dict[str, Any]:
    return {"guidance_embeds": False, **switches}


PUBLISHED = {
    "Z-Image": Published("ZImagePipeline", ZImageTransformer2DModel, {}, 6.16, 34 * 4),
    "FLUX.2 klein 4B": Published(
        "Flux2KleinPipeline",
        Flux2Transformer2DModel,
        klein(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680),
        3.88,
        5 * 8 + 20 * 2,
        AutoencoderKLFlux2,
    ),
    "FLUX.2 klein 9B": Published(
        "Flux2KleinPipeline",
        Flux2Transformer2DModel,
        klein(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288),
        9.08,
        8 * 8 + 24 * 2,
        AutoencoderKLFlux2,
    ),
    "FLUX.2 dev": Published(
        "Flux2Pipeline", Flux2Transformer2DModel, {}, 32.2, 8 * 8 + 48 * 2, AutoencoderKLFlux2
    ),
    "FLUX.3 klein": Published(
        "Flux3ModularPipeline", Flux3Transformer2DModel, {}, 5.54, (5 + 5 + 28) * 4, AutoencoderKLFlux2
    ),
    "FLUX.3 klein, distilled": Published(
        "Flux3DistilledModularPipeline",
        Flux3Transformer2DModel,
        {"flow_map": True},
        5.55,
        (5 + 5 + 28) * 4,
        AutoencoderKLFlux2,
    ),
    "Qwen-Image": Published(
        "QwenImagePipeline", QwenImageTransformer2DModel, {}, 20.4, 60 * 4, AutoencoderKLQwenImage
    ),
    "Qwen-Image-Edit 2511": Published(
        "QwenImageEditPlusPipeline",
        QwenImageTransformer2DModel,
        {"zero_cond_t": True},
        20.4,
        60 * 4,
        AutoencoderKLQwenImage,
    ),
    "Qwen-Image 2.1": Published(
        "QwenImage21Pipeline", QwenImage21Transformer2DModel, {}, 7.1, 32 * 4, AutoencoderKLQwenImage21
    ),
    "Krea 2": Published(
        "Krea2Pipeline", Krea2Transformer2DModel, {}, 12.8, (28 + 4) * 5, AutoencoderKLQwenImage
    ),
    "Ideogram 4": Published(
        "Ideogram4Pipeline", Ideogram4Transformer2DModel, {}, 9.28, 34 * 7, AutoencoderKLFlux2
    ),
    "Chroma": Published("ChromaPipeline", ChromaTransformer2DModel, {}, 8.90, 19 * 8 + 38 * 3),
    "HiDream-I1": Published(
        "HiDreamImagePipeline",
        HiDreamImageTransformer2DModel,
        {
            "patch_size": 2,
            "in_channels": 16,
            "caption_channels": [4096, 4096],
            "axes_dims_rope": (64, 32, 32),
            "llama_layers": [*range(32), *[31] * 16],
        },
        17.1,
        16 * 8 + 32 * 4,
    ),
    "Sana 1.6B": Published("SanaPipeline", SanaTransformer2DModel, {}, 1.60, 20 * 8, AutoencoderDC),
    "Lumina 2": Published(
        "Lumina2Pipeline", Lumina2Transformer2DModel, {"cap_feat_dim": 2304}, 2.61, (26 + 4) * 4
    ),
    "AuraFlow": Published(
        "AuraFlowPipeline",
        AuraFlowTransformer2DModel,
        {},
        6.83,
        4 * 8 + 32 * 4,
        partial(autoencoder, latent_channels=4, scaling_factor=0.13025),
    ),
    "PixArt-Sigma": Published(
        "PixArtSigmaPipeline",
        PixArtTransformer2DModel,
        {"caption_channels": 4096, "use_additional_conditions": False},
        0.61,
        28 * 8,
        partial(autoencoder, latent_channels=4, scaling_factor=0.13025),
    ),
}


def published(name: str, folder: Path) -> Path:
    """Write one of `PUBLISHED`, without text encoders."""
    found = PUBLISHED[name]
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if found.pipeline == "SanaPipeline":
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    if found.pipeline == "PixArtSigmaPipeline":
        scheduler = DPMSolverMultistepScheduler()
    with torch.device("meta"):
        parts = {"transformer": found.denoiser(**found.switches), "vae": found.vae()}
    if not found.pipeline.endswith("ModularPipeline"):  # those are published without a scheduler
        parts["scheduler"] = scheduler
    return save(folder, found.pipeline, parts)
