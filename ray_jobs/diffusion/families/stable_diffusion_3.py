"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from ray_jobs.diffusion.families.family import PATCH, Captions, Encoders, FlowMatchingFamily

T5_TOKENS = 256


class StableDiffusion3(FlowMatchingFamily):
    """Stable Diffusion 3: two CLIP text encoders and T5, which a model may leave out (section 5.3.3)."""

    pipeline_class = "StableDiffusion3Pipeline"
    tokens = ("input_ids", "input_ids_2", "input_ids_3")
    embeds = ("prompt_embeds", "pooled_prompt_embeds")
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    trainable_text_encoders = ("text_encoder", "text_encoder_2")
    max_tokens = {"input_ids_3": T5_TOKENS}
    max_shift = 1.16

    def patch(self, denoiser: Mapping[str, Any]) -> int:
        return int(denoiser.get("patch_size", PATCH))

    def max_side(self, autoencoder: Mapping[str, Any], denoiser: Mapping[str, Any]) -> int | None:
        patches = int(denoiser.get("pos_embed_max_size", 96))  # diffusers' default
        return patches * self.size_multiple(autoencoder, denoiser)

    def embed(self, parts: Encoders, tokens: Captions) -> Captions:
        """Concatenate both CLIP encoders' penultimate layers, pad them to T5's width, and append T5's tokens.

        Without T5, return the CLIP embeddings unpadded: T5's width is in the denoiser's configuration, so
        `denoise` pads them.
        """
        clip = [
            parts[part](tokens[name], output_hidden_states=True)
            for part, name in zip(self.text_encoders[:2], self.tokens[:2], strict=True)
        ]
        embeds = torch.cat([each.hidden_states[-2] for each in clip], dim=-1)
        if "text_encoder_3" in parts:
            t5 = parts["text_encoder_3"](tokens["input_ids_3"]).last_hidden_state
            embeds = torch.cat([pad(embeds, (0, t5.shape[-1] - embeds.shape[-1])), t5], dim=1)
        pooled = torch.cat([each.text_embeds for each in clip], dim=-1)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def denoise(
        self,
        denoiser: Any,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        captions: Captions,
        sizes: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert sizes is None and guidance is None
        embeds = captions["prompt_embeds"]
        missing = denoiser.config.joint_attention_dim - embeds.shape[-1]
        if missing:  # without T5, zeros take its place
            embeds = pad(embeds, (0, missing, 0, T5_TOKENS))
        return denoiser(
            latents,
            encoder_hidden_states=embeds,
            pooled_projections=captions["pooled_prompt_embeds"],
            timestep=timesteps,
            return_dict=False,
        )[0]
