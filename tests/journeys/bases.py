"""Tiny bases in folders like those of the published models: their classes, scheduler files, index entries,
names of tensors, formats of tokenizers, variants and shards; only the sizes are small and the weights random.

The published facts are those of the repositories named in each builder. Each builder writes into `folder`
and returns it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ray_jobs.diffusion.families import architecture, tiny
from tests import tiny_models
from tests.journeys.published import (
    UNET_FIELDS,
    VAE_FIELDS,
    add_feature_extractor,
    add_safety_checker,
    complete_index,
    keep_fields,
    old_text_encoder,
    old_tokenizer,
    put_scheduler,
    save,
)

SCALED_LINEAR = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
PNDM = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **SCALED_LINEAR}


def stable_diffusion_1(
    folder: Path, *, sample_size: int | tuple[int, int] = 64, variant: str | None = None, **unet: Any
) -> Path:
    """stable-diffusion-v1-5/stable-diffusion-v1-5.

    Args:
        sample_size: of the UNet, in latents: a side, or height and width.
        variant: of the weights' files: fp16 also halves them.
        unet: further fields of the UNet.
    """
    torch.manual_seed(0)
    pipeline = _stable_diffusion(sample_size, **unet)
    save(pipeline, folder, variant)
    index: dict[str, Any] = {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    complete_index(folder, "0.6.0", scheduler="PNDMScheduler", **index)
    put_scheduler(folder, PNDM)
    keep_fields(folder / "unet", "0.6.0", (*UNET_FIELDS, *unet))
    keep_fields(folder / "vae", "0.6.0", VAE_FIELDS)
    old_text_encoder(folder / "text_encoder")
    old_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>")
    add_safety_checker(folder, variant)
    return folder


def stable_diffusion_2(folder: Path, *, sample_size: int | tuple[int, int] = 8, **unet: Any) -> Path:
    """stabilityai/stable-diffusion-2-1: OpenCLIP without its last layer, velocity prediction by DDIM, and a
    tokenizer that pads with `!`."""
    torch.manual_seed(0)
    published = {"use_linear_projection": True, "attention_head_dim": [1, 2], "upcast_attention": True}
    save(_stable_diffusion(sample_size, **published, **unet), folder)
    absent = {"feature_extractor": ["transformers", "CLIPImageProcessor"], "safety_checker": [None, None]}
    complete_index(folder, "0.8.0", scheduler="DDIMScheduler", requires_safety_checker=False, **absent)
    add_feature_extractor(folder)
    ddim = {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "prediction_type": "v_prediction"}
    put_scheduler(folder, ddim | SCALED_LINEAR)
    later = ("dual_cross_attention", "only_cross_attention", "num_class_embeds", *published, *unet)
    keep_fields(folder / "unet", "0.10.0.dev0", (*UNET_FIELDS, *later))
    keep_fields(folder / "vae", "0.10.0.dev0", VAE_FIELDS)
    old_text_encoder(folder / "text_encoder")
    old_tokenizer(folder / "tokenizer", pad_token="!")
    return folder


def stable_diffusion_xl(folder: Path, *, variant: str | None = None) -> Path:
    """stabilityai/stable-diffusion-xl-base-1.0.

    Args:
        variant: of the weights' files: fp16 also halves them.
    """
    pipeline = _loaded("StableDiffusionXLPipeline", folder)
    save(pipeline, folder, variant)
    absent = {name: [None, None] for name in ("feature_extractor", "image_encoder")}
    given = {"force_zeros_for_empty_prompt": True, "add_watermarker": None}
    complete_index(folder, "0.19.0.dev0", scheduler="EulerDiscreteScheduler", **absent, **given)
    euler = {"interpolation_type": "linear", "sample_max_value": 1.0, "timestep_spacing": "leading"}
    euler |= {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0"}
    put_scheduler(folder, SCALED_LINEAR | euler | {"prediction_type": "epsilon", "use_karras_sigmas": False})
    fields = (*VAE_FIELDS, "scaling_factor", "force_upcast")
    keep_fields(folder / "vae", "0.20.0.dev0", fields, force_upcast=True)
    for name, pad_token in (("", "<|endoftext|>"), ("_2", "!")):
        old_text_encoder(folder / f"text_encoder{name}")
        old_tokenizer(folder / f"tokenizer{name}", pad_token)
    return folder


def _put_flow(folder: Path, version: str, **shift: Any) -> None:
    """The index and the scheduler's file of a flow-matching model, as a release of diffusers wrote them."""
    name = "FlowMatchEulerDiscreteScheduler"
    absent = {part: [None, None] for part in ("feature_extractor", "image_encoder")}
    complete_index(folder, version, scheduler=name, **absent)
    flow = {"_class_name": name, "_diffusers_version": version, "num_train_timesteps": 1000, "shift": 3.0}
    put_scheduler(folder, flow | shift)


def stable_diffusion_3(folder: Path) -> Path:
    """stabilityai/stable-diffusion-3-medium-diffusers: half precision, T5 in shards."""
    pipeline = _loaded("StableDiffusion3Pipeline", folder)
    pipeline.to(dtype=torch.float16)
    save(pipeline, folder, sharded=["text_encoder_3"])
    _put_flow(folder, "0.29.0.dev0")
    for name, pad_token in (("", "<|endoftext|>"), ("_2", "!")):
        old_text_encoder(folder / f"text_encoder{name}")
        old_tokenizer(folder / f"tokenizer{name}", pad_token)
    return folder


def flux(folder: Path) -> Path:
    """black-forest-labs/FLUX.1-dev: bfloat16, transformer and T5 in shards."""
    pipeline = _loaded("FluxPipeline", folder)
    pipeline.to(dtype=torch.bfloat16)
    save(pipeline, folder, sharded=["transformer", "text_encoder_2"])
    shift = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15}
    _put_flow(folder, "0.30.0.dev0", **shift, use_dynamic_shifting=True)
    old_text_encoder(folder / "text_encoder")
    old_tokenizer(folder / "tokenizer", "<|endoftext|>")
    return folder


def half(name: str, folder: Path, sharded: Sequence[str] = ("transformer", "text_encoder")) -> Path:
    """One of `tiny_models.MODELS` in bfloat16, with components in shards, as most are published."""
    family, variant = tiny_models.BY_NAME[name]
    pipeline: Any = family.tiny(tiny_models.captions(), variant)
    pipeline.to(dtype=torch.bfloat16)
    save(pipeline, folder, sharded=sharded)
    return folder


def _loaded(name: str, folder: Path) -> Any:
    """One of `tiny_models.MODELS`, as it is read from its folder."""
    from diffusers import DiffusionPipeline

    with TemporaryDirectory(dir=folder.parent) as written:
        return DiffusionPipeline.from_pretrained(tiny_models.write(name, Path(written)))


def _stable_diffusion(sample_size: int | tuple[int, int], **unet: Any) -> Any:
    """A StableDiffusionPipeline. Attention is at the lowest level only, so that its own size costs little."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = tiny_models.clip_tokenizer()
    return StableDiffusionPipeline(
        vae=architecture.build_autoencoder([8, 16, 16, 16], latent_channels=4, resolution=64),
        text_encoder=architecture.build_text_encoder(tokenizer, width=tiny.CLIP_WIDTH, layers=3, heads=2),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            **{
                "sample_size": sample_size,
                "block_out_channels": (16, 32),
                "norm_num_groups": 8,
                "layers_per_block": 1,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": tiny.CLIP_WIDTH,
                "attention_head_dim": 2,
                **unet,
            }
        ),
        scheduler=PNDMScheduler(skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


BASES: dict[str, Callable[[Path], Path]] = {
    "Stable Diffusion 1.5": stable_diffusion_1,
    "a UNet that is told its guidance": partial(stable_diffusion_1, time_cond_proj_dim=16),
    "Stable Diffusion 2.1": stable_diffusion_2,
    "a UNet that is not square": partial(stable_diffusion_2, sample_size=(8, 12)),
    "Stable Diffusion XL": stable_diffusion_xl,
    "Stable Diffusion XL, only fp16 files": partial(stable_diffusion_xl, variant="fp16"),
    "Stable Diffusion 3": stable_diffusion_3,
    "FLUX.1-dev": flux,
    "FLUX.1-schnell": partial(half, "FluxPipeline-schnell"),
    "FLUX.1 Fill": partial(half, "FluxFillPipeline"),
    "FLUX.1 Kontext": partial(half, "FluxKontextPipeline"),
    "Chroma": partial(half, "ChromaPipeline", sharded=()),
    "Z-Image": partial(half, "ZImagePipeline", sharded=["transformer"]),
    "FLUX.2 klein": partial(half, "Flux2KleinPipeline", sharded=()),
    "FLUX.2 dev": partial(half, "Flux2Pipeline"),
    "FLUX.3 klein": partial(half, "Flux3ModularPipeline"),
    "FLUX.3 klein, distilled": partial(half, "Flux3DistilledModularPipeline"),
    "Qwen-Image": partial(half, "QwenImagePipeline"),
    "Qwen-Image-Edit": partial(half, "QwenImageEditPlusPipeline"),
    "Qwen-Image 2.1": partial(half, "QwenImage21Pipeline"),
    "Ideogram 4": partial(half, "Ideogram4Pipeline"),
    "Krea 2": partial(half, "Krea2Pipeline"),
    "HiDream-I1": partial(half, "HiDreamImagePipeline"),
    "Sana": partial(half, "SanaPipeline"),
    "Lumina 2": partial(half, "Lumina2Pipeline"),
    "AuraFlow": partial(half, "AuraFlowPipeline"),
    "PixArt-Sigma": partial(half, "PixArtSigmaPipeline"),
}
