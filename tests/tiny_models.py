"""A small model of each family with random weights, of the classes that diffusers and transformers load.

Each builder writes one into `folder`, in diffusers' format, and returns `folder`.
"""

from pathlib import Path
from typing import Any

import torch

from ray_jobs.diffusion import architecture

MAX_TOKENS = 16  # of the CLIP text encoders
CLIP_WIDTH, CLIP_2_WIDTH, POOLED, POOLED_2, T5_WIDTH = 32, 48, 16, 24, 96


def tiny_stable_diffusion_xl(folder: Path) -> Path:
    """A StableDiffusionXLPipeline of 64 x 64 pixels with two text encoders."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    StableDiffusionXLPipeline(
        vae=architecture.build_autoencoder([8, 16, 16, 16], latent_channels=4, resolution=64),
        text_encoder=clip(tokenizer, CLIP_WIDTH),
        text_encoder_2=clip(tokenizer, CLIP_2_WIDTH, POOLED_2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=CLIP_WIDTH + CLIP_2_WIDTH,
            attention_head_dim=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + POOLED_2,
        ),
        # As Stable Diffusion XL's own is configured.
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
        ),
    ).save_pretrained(folder)
    return folder


def tiny_stable_diffusion_3(folder: Path, *, t5: bool = True, dynamic_shifting: bool = False) -> Path:
    """A StableDiffusion3Pipeline of 64 x 64 pixels with two CLIP text encoders and, or without, T5."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=POOLED + POOLED_2,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shifting),
        vae=shifted_autoencoder(),
        text_encoder=clip(tokenizer, CLIP_WIDTH, POOLED),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, CLIP_2_WIDTH, POOLED_2),
        tokenizer_2=tokenizer,
        text_encoder_3=t5_encoder() if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    ).save_pretrained(folder)
    return folder


def tiny_flux(folder: Path, *, distilled_guidance: bool = True) -> Path:
    """A FluxPipeline like FLUX.1-dev, or like FLUX.1-schnell, which is not told its guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=4 * 4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=distilled_guidance,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if distilled_guidance else 1.0, use_dynamic_shifting=distilled_guidance
        ),
        vae=shifted_autoencoder(),
        text_encoder=clip(tokenizer, CLIP_WIDTH),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def shifted_autoencoder() -> Any:
    """An autoencoder whose latents are scaled and shifted, as those of flow-matching models are."""
    autoencoder = architecture.build_autoencoder([8, 16, 16, 16], latent_channels=4, resolution=64)
    autoencoder.register_to_config(scaling_factor=1.5, shift_factor=0.25)
    return autoencoder


def clip_tokenizer() -> Any:
    return architecture.build_tokenizer(_captions(), vocabulary=600, max_tokens=MAX_TOKENS)


def clip(tokenizer: Any, width: int, projection: int | None = None) -> Any:
    """A CLIPTextModel, or with a projection a CLIPTextModelWithProjection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=projection or width,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def clip_model(folder: Path, side: int) -> Path:
    """A whole CLIPModel, of pictures and captions, with its processor; `side`: pixels of what it looks at."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**tower, "image_size": side, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    square = {"height": side, "width": side}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
    CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def t5_tokenizer() -> Any:
    """A T5TokenizerFast that knows the words of the captions, and letters for what else there is."""
    from transformers import T5TokenizerFast

    words = sorted({f"▁{word}" for caption in _captions() for word in caption.split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    special = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    pieces = [(word, -1.0) for word in words] + [(letter, -5.0) for letter in ["▁", *letters]]
    return T5TokenizerFast(vocab=special + pieces, extra_ids=0, model_max_length=512)


def t5_encoder() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def _captions() -> list[str]:
    from tests.conftest import captions

    return captions()
