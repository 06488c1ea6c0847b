"""Qwen-Image (Wu et al., arXiv 2508.02324), also its release 2512."""

from collections.abc import Sequence
from typing import Any

import torch

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.family import (
    UNET_ATTENTION,
    Components,
    Conditions,
    Family,
    references_of,
)
from ray_jobs.diffusion.families.flux import PATCH, FluxCodec, from_tokens, to_tokens
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.published import KohyaFiles
from ray_jobs.diffusion.families.text import (
    MASK,
    Captions,
    Encoders,
    MaskedText,
    without_padding,
    zero_padding,
)
from ray_jobs.diffusion.protocols import Autoencoder, Denoiser, Pipeline, Settings, TextEncoder, Tokenizer

MAX_TOKENS = 512
PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
PREFIX_TOKENS = 34  # of the published tokenizer; they are encoded, but the denoiser does not receive them


class QwenImageText(MaskedText):
    """The last layer of Qwen2.5-VL on a caption in a template of the family's own."""

    caption_tokens, width = MAX_TOKENS, "joint_attention_dim"
    prefix, prefix_tokens = PREFIX, PREFIX_TOKENS
    max_tokens = {"input_ids": PREFIX_TOKENS + MAX_TOKENS}

    def written(self, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
        return [self.prefix + text + SUFFIX for text in texts]

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        encoder = encoders["text_encoder"]
        found = encoder(
            input_ids=tokens["input_ids"].long(),  # as places of pictures need it
            attention_mask=tokens["attention_mask"].long(),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # none are needed
            **self.seen(encoder, tokens),
        )
        states, mask = (
            each[:, self.prefix_tokens :] for each in (found.hidden_states[-1], tokens["attention_mask"])
        )
        return {"prompt_embeds": zero_padding(states, mask), MASK: mask}

    def seen(self, encoder: TextEncoder, tokens: Captions) -> Captions:
        """Return the encoder's inputs for pictures in its texts."""
        return {}


class QwenImageCodec(FluxCodec):
    """Latents of an autoencoder for videos, to which an image is one frame."""

    keeps_state = True  # features of earlier frames (diffusers 0.42.1)

    def channels(self, config: Settings) -> int:
        return int(config["z_dim"])

    def latent_pixels(self, config: Settings) -> int:
        return int(2 ** len(config["temperal_downsample"]))  # diffusers' spelling

    def posterior(self, autoencoder: Autoencoder, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = super().posterior(autoencoder, pixels.unsqueeze(2))
        return mean.squeeze(2), logvar.squeeze(2)

    def decode(self, autoencoder: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
        return super().decode(autoencoder, latents.unsqueeze(2)).squeeze(2)


class QwenImage(Family):
    """Qwen-Image: a multimodal diffusion transformer with masked captions."""

    pipeline_class = "QwenImagePipeline"
    in_comfyui = True
    kohya = KohyaFiles("networks.lora_qwen_image", "qwen_image", "Qwen-Image")
    trainable = {"transformer": UNET_ATTENTION}  # of the image's tokens, as diffusers' own training does
    text: QwenImageText = QwenImageText()
    codec = QwenImageCodec()
    schedule = RectifiedFlow(max_shift=1.15, patch=PATCH, even_sigmas=True)

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        tokens, grid = to_tokens(latents)
        further = [to_tokens(each) for each in references_of(conditions)]
        embeds, mask = without_padding(conditions)
        shapes = [(1, *each) for each in (grid, *(of for _, of in further))]
        predicted = model["transformer"](
            torch.cat([tokens, *(each for each, _ in further)], dim=1),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            timestep=timesteps.to(latents.dtype) / 1000,  # the transformer multiplies it by 1000 again
            img_shapes=[shapes] * len(tokens),
            return_dict=False,
        )[0]
        return from_tokens(predicted[:, : tokens.shape[1]], grid)

    def guide(
        self, unconditional: torch.Tensor, conditional: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Apply guidance, and give each token the length of its conditional prediction."""
        tokens, grid = to_tokens(super().guide(unconditional, conditional, scale))
        length = to_tokens(conditional)[0].norm(dim=-1, keepdim=True)
        return from_tokens(tokens * (length / tokens.norm(dim=-1, keepdim=True)), grid)

    def guidance_arguments(self, denoiser: Settings, scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale, "negative_prompt": ""}  # the pipeline's guidance needs both

    def unused_layers(self, denoiser: Denoiser, num_references: int = 0) -> tuple[str, ...]:
        """Return the last block's layers that only change the caption's tokens."""
        block = f"transformer_blocks.{len(denoiser.transformer_blocks) - 1}"
        names = (
            "attn.add_q_proj",
            "attn.norm_added_q",
            "attn.to_add_out",
            "txt_mlp.net.0.proj",
            "txt_mlp.net.2",
        )
        return tuple(f"{block}.{name}" for name in names)

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import QwenImagePipeline

        return QwenImagePipeline(**self.tiny_parts(captions))

    def tiny_parts(self, captions: Sequence[str], **denoiser: bool) -> dict[str, Any]:
        """Return the components of `tiny`, by name.

        Args:
            denoiser: further options of the denoiser.
        """
        from diffusers import QwenImageTransformer2DModel
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        torch.manual_seed(0)
        tokenizer = tiny.qwen_tokenizer(captions, [self.text.prefix])
        options = tiny.qwen_vl_options(tokenizer, 2, 1e6, fullatt_block_indexes=[0])
        config = Qwen2_5_VLConfig(**options)
        return {
            "transformer": QwenImageTransformer2DModel(
                in_channels=4 * PATCH**2,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=tiny.QWEN_WIDTH,
                axes_dims_rope=(4, 6, 6),
                **denoiser,
            ),
            "scheduler": tiny.qwen_scheduler(),
            "vae": tiny.qwen_autoencoder(),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
            "tokenizer": tokenizer,
        }
