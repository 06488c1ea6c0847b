"""PixArt-Sigma (Chen et al., arXiv 2403.04692)."""

from collections.abc import Sequence
from typing import Any

import torch

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.families.family import UNET_ATTENTION, Components, Conditions, Family
from ray_jobs.diffusion.families.noise_schedule import VariancePreserving
from ray_jobs.diffusion.families.text import MASK, Captions, Encoders, MaskedText, zero_padding
from ray_jobs.diffusion.protocols import Pipeline, Settings

MAX_TOKENS = 300


class PixArtSigmaText(MaskedText):
    """T5 on captions in lower case, with its attention mask."""

    caption_tokens, width = MAX_TOKENS, "caption_channels"
    max_tokens = {"input_ids": MAX_TOKENS}

    def as_prompt(self, caption: str) -> str:
        return caption.lower().strip()

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        mask = tokens["attention_mask"]
        states = encoders["text_encoder"](tokens["input_ids"], attention_mask=mask.int()).last_hidden_state
        return {"prompt_embeds": zero_padding(states, mask), MASK: mask}


class PixArtSigmaCodec(Codec):
    """Latents in patches."""

    def patch(self, denoiser: Settings) -> int:
        return int(denoiser["patch_size"])


class PixArtSigma(Family):
    """PixArt-Sigma: a diffusion transformer with cross-attention that predicts the noise."""

    pipeline_class = "PixArtSigmaPipeline"
    in_comfyui = True
    trainable = {"transformer": UNET_ATTENTION}
    text, codec, schedule = PixArtSigmaText(), PixArtSigmaCodec(), VariancePreserving()
    has_lora_loader = False

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        predicted: torch.Tensor = model["transformer"](
            latents,
            encoder_hidden_states=conditions["prompt_embeds"],
            encoder_attention_mask=conditions[MASK],
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return predicted[:, : latents.shape[1]]  # the other channels are a variance that samplers do not use

    def guidance_arguments(self, denoiser: Settings, scale: float) -> dict[str, Any]:
        # Else the pipeline draws at a size of its own list and scales the image, and captions depend on which
        # packages are installed.
        return {"guidance_scale": scale, "use_resolution_binning": False, "clean_caption": False}

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

        torch.manual_seed(0)
        return PixArtSigmaPipeline(
            tokenizer=tiny.t5_tokenizer(captions),
            text_encoder=tiny.t5_encoder(captions),
            vae=tiny.shifted_autoencoder(shift=None),
            transformer=PixArtTransformer2DModel(
                in_channels=4,
                out_channels=8,
                sample_size=8,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=16,
                cross_attention_dim=32,
                caption_channels=tiny.T5_WIDTH,
                use_additional_conditions=False,
            ),
            scheduler=DPMSolverMultistepScheduler(),
        )
