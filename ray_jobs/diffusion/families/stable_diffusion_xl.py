"""Stable Diffusion XL (Podell et al., arXiv 2307.01952)."""

from collections.abc import Mapping
from typing import Any

import torch

from ray_jobs.diffusion.families.family import Captions, DiffusionFamily, Encoders


class StableDiffusionXL(DiffusionFamily):
    """Stable Diffusion XL: two CLIP text encoders, the second also pooled, and size conditioning.

    See sections 2.1 and 2.2 of the paper.
    """

    pipeline_class = "StableDiffusionXLPipeline"
    tokens = ("input_ids", "input_ids_2")
    embeds = ("prompt_embeds", "pooled_prompt_embeds")
    text_encoders = trainable_text_encoders = ("text_encoder", "text_encoder_2")
    sizes = True

    def embed(self, parts: Encoders, tokens: Captions) -> Captions:
        """Return both encoders' penultimate layers, concatenated, and the second one's projection."""
        first = parts["text_encoder"](tokens["input_ids"], output_hidden_states=True)
        second = parts["text_encoder_2"](tokens["input_ids_2"], output_hidden_states=True)
        return {
            "prompt_embeds": torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1),
            "pooled_prompt_embeds": second.text_embeds,
        }

    def unconditional(self, settings: Mapping[str, Any], empty: Captions) -> Captions:
        """Return zeros if the model's configuration asks for them, which is diffusers' default."""
        if not settings.get("force_zeros_for_empty_prompt", True):
            return empty
        return {name: torch.zeros_like(tensor) for name, tensor in empty.items()}

    def denoise(
        self,
        denoiser: Any,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        captions: Captions,
        sizes: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert sizes is not None
        return denoiser(
            latents,
            timesteps,
            encoder_hidden_states=captions["prompt_embeds"],
            timestep_cond=self.guidance_embedding(denoiser, latents, guidance),
            added_cond_kwargs={"text_embeds": captions["pooled_prompt_embeds"], "time_ids": sizes},
            return_dict=False,
        )[0]
