"""FLUX.1 of Black Forest Labs (https://github.com/black-forest-labs/flux)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ray_jobs.diffusion.families.family import PATCH, Captions, Encoders, FlowMatchingFamily


class Flux(FlowMatchingFamily):
    """FLUX.1: T5 and the pooled embedding of CLIP; latents are packed into patches.

    FLUX.1-dev takes guidance as input; FLUX.1-schnell has none.
    """

    pipeline_class = "FluxPipeline"
    tokens = ("input_ids", "input_ids_2")
    embeds = ("prompt_embeds", "pooled_prompt_embeds")
    text_encoders = ("text_encoder", "text_encoder_2")
    trainable_text_encoders = ("text_encoder",)
    max_tokens = {"input_ids_2": 512}
    max_shift = 1.15

    def embed(self, parts: Encoders, tokens: Captions) -> Captions:
        return {
            "prompt_embeds": parts["text_encoder_2"](tokens["input_ids_2"]).last_hidden_state,
            "pooled_prompt_embeds": parts["text_encoder"](tokens["input_ids"]).pooler_output,
        }

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
        if self.distilled_guidance(denoiser):
            guidance = latents.new_ones(len(latents)) if guidance is None else guidance
        else:
            assert guidance is None
        packed = pixel_unshuffle(latents, PATCH)  # N x 4C x h/2 x w/2
        rows, columns = packed.shape[-2:]
        embeds = captions["prompt_embeds"]
        predicted = denoiser(
            packed.flatten(2).transpose(1, 2),
            encoder_hidden_states=embeds,
            pooled_projections=captions["pooled_prompt_embeds"],
            timestep=timesteps / 1000,  # the transformer multiplies it by 1000 again
            img_ids=_positions(rows, columns, latents.device),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device),
            guidance=guidance,
            return_dict=False,
        )[0]
        return pixel_shuffle(predicted.transpose(1, 2).unflatten(2, (rows, columns)), PATCH)

    def distilled_guidance(self, denoiser: Any) -> bool:
        return bool(denoiser.config.guidance_embeds)

    def set_timesteps(
        self, scheduler: Any, num_steps: int, latent_shape: Sequence[int], device: str | torch.device
    ) -> None:
        """Set sigmas in even steps from pure noise, shifted according to the image's size."""
        if scheduler.config.get("use_flow_sigmas"):  # a scheduler that spaces its sigmas itself
            return super().set_timesteps(scheduler, num_steps, latent_shape, device)
        sigmas = [1 - step / num_steps for step in range(num_steps)]
        shift = self.dynamic_shift(scheduler.config, latent_shape)
        scheduler.set_timesteps(sigmas=sigmas, device=device, **shift)

    def sample_size(self, pipeline: Any) -> tuple[int, int]:
        return (pipeline.default_sample_size,) * 2  # the transformer's configuration has none


def _positions(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return (0, row, column) of each patch: float32, rows * columns x 3."""
    row = torch.arange(rows, dtype=torch.float32, device=device)
    column = torch.arange(columns, dtype=torch.float32, device=device)
    return torch.cartesian_prod(row.new_zeros(1), row, column)
