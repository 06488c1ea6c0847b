"""Lumina-Image 2.0 (Qin et al., arXiv 2503.21758)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.families.family import UNET_ATTENTION, Components, Conditions, Family
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.published import KohyaFiles, Published
from ray_jobs.diffusion.families.text import MASK, Captions, Encoders, MaskedText, zero_padding
from ray_jobs.diffusion.protocols import Pipeline, Settings

MAX_TOKENS = 256
# The pipeline's `system_prompt` and what separates it from a prompt.
SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text "
    "alignment based on textual prompts or user prompts. <Prompt Start> "
)

QKV = ("to_q", "to_k", "to_v")
FIRST_NAMES = {
    ".attn.to_out.0": ".attention.out",
    ".feed_forward.linear_": ".feed_forward.w",
    ".norm1.linear": ".adaLN_modulation.1",
}


class Lumina2Text(MaskedText):
    """Gemma 2's penultimate layer on a system prompt and the caption.

    Captions that guidance leads away from have no system prompt. The transformer takes as many of the first
    tokens as the mask has, wherever it has them: texts are padded on the right, to which the pipeline sets
    its tokenizer.
    """

    caption_tokens, width = MAX_TOKENS, "cap_feat_dim"
    max_tokens = {"input_ids": MAX_TOKENS}

    def as_prompt(self, caption: str) -> str:
        return SYSTEM_PROMPT + caption

    def as_negative(self, caption: str) -> str:
        return caption

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        mask = tokens["attention_mask"]
        states = encoders["text_encoder"](
            tokens["input_ids"], attention_mask=mask.int(), output_hidden_states=True
        ).hidden_states
        return {"prompt_embeds": zero_padding(states[-2], mask), MASK: mask}


class Lumina2Codec(Codec):
    """Latents in patches, with tables of positions for each side."""

    def patch(self, denoiser: Settings) -> int:
        return int(denoiser["patch_size"])

    def max_side(self, config: Settings, denoiser: Settings) -> int | None:
        return min(denoiser["axes_lens"][1:]) * self.size_multiple(config, denoiser)


class Lumina2(Family):
    """Lumina-Image 2.0: one stream of caption and image tokens, predicting a rectified flow's opposite."""

    pipeline_class = "Lumina2Pipeline"
    trainable = {"transformer": UNET_ATTENTION}
    adapter_mark = r"layers[._]\d+[._](attn[._]to_q|attention[._]qkv)"
    kohya = KohyaFiles("networks.lora_lumina", "lumina2", "lumina-2")
    text, codec = Lumina2Text(), Lumina2Codec()
    schedule = RectifiedFlow(max_shift=1.15, even_sigmas=True)

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        predicted = model["transformer"](
            latents,
            timestep=1 - timesteps / 1000,  # it counts time from noise to image
            encoder_hidden_states=conditions["prompt_embeds"],
            encoder_attention_mask=conditions[MASK],
            return_dict=False,
        )[0]
        return -predicted  # it predicts the image minus the noise

    def recomputed_blocks(self, denoiser: Any) -> list[nn.Module]:
        return list(denoiser.layers)  # diffusers 0.42.1 leaves out those before, which refine the inputs

    def guide(
        self, unconditional: torch.Tensor, conditional: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Apply guidance, and give each row of latents the norm that it has in the conditional prediction.

        diffusers' pipeline takes norms over the width alone.
        """
        guided = super().guide(unconditional, conditional, scale)
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def comfyui_layer(self, component: str, layer: str) -> tuple[str, int, int]:
        """Return the first publication's names; it has queries, keys and values in one layer."""
        name, parts = self.published_layer(layer, {})
        return f"diffusion_model.{name}", parts.index(layer), len(parts)

    def published_layer(self, layer: str, denoiser: Settings) -> Published:
        block, _, kind = layer.rpartition(".attn.")
        if kind in QKV:
            return f"{block}.attention.qkv", tuple(f"{block}.attn.{each}" for each in QKV)
        name = layer
        for ours, theirs in FIRST_NAMES.items():
            name = name.replace(ours, theirs)
        return name, (layer,)

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

        torch.manual_seed(0)
        tokenizer = tiny.gemma_tokenizer([*captions, SYSTEM_PROMPT])
        return Lumina2Pipeline(
            transformer=Lumina2Transformer2DModel(
                sample_size=8,
                in_channels=4,
                hidden_size=32,
                num_layers=2,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=16,
                axes_dim_rope=(4, 6, 6),
                axes_lens=(300, 64, 64),
                cap_feat_dim=tiny.GEMMA_WIDTH,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=tiny.shifted_autoencoder(),
            text_encoder=tiny.gemma_encoder(tokenizer),
            tokenizer=tokenizer,
        )
