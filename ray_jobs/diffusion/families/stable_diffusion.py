"""Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752)."""

from typing import Any

import torch

from ray_jobs.diffusion.families.family import Captions, DiffusionFamily, Encoders


class StableDiffusion(DiffusionFamily):
    """Stable Diffusion 1.x and 2.x: one CLIP text encoder.

    The scheduler's configuration says whether the UNet predicts the noise (1.x) or the velocity (2.x).
    """

    pipeline_class = "StableDiffusionPipeline"
    tokens = ("input_ids",)
    embeds = ("prompt_embeds",)
    text_encoders = trainable_text_encoders = ("text_encoder",)

    def embed(self, parts: Encoders, tokens: Captions) -> Captions:
        return {"prompt_embeds": parts["text_encoder"](tokens["input_ids"]).last_hidden_state}

    def denoise(
        self,
        denoiser: Any,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        captions: Captions,
        sizes: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert sizes is None
        return denoiser(
            latents,
            timesteps,
            encoder_hidden_states=captions["prompt_embeds"],
            timestep_cond=self.guidance_embedding(denoiser, latents, guidance),
            return_dict=False,
        )[0]
