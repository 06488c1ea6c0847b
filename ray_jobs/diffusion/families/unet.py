"""What the families with a UNet share."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ray_jobs.diffusion.families.checkpoints import Tensors, autoencoder_checkpoint, unet_checkpoint
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.families.control import CONTROL, CONTROLNET, added, of_controlled
from ray_jobs.diffusion.families.family import Components, Conditions, Family
from ray_jobs.diffusion.families.noise_schedule import VariancePreserving
from ray_jobs.diffusion.protocols import Denoiser, Pipeline, Settings


class UNetFamily(Family):
    """A UNet with cross-attention over a variance-preserving noise schedule."""

    codec, schedule = Codec(), VariancePreserving()
    is_unet = True
    adapter_mark = r"(down|mid|up|input|middle|output)_block"
    text_widths: tuple[int, ...] = ()
    """Widths of the captions' embeddings in published models."""

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        denoiser = model[self.denoiser]
        down, middle = self._residuals(model, latents, timesteps, conditions)
        return denoiser(
            latents,
            timesteps,
            encoder_hidden_states=conditions["prompt_embeds"],
            timestep_cond=self.guidance_embedding(denoiser, latents, conditions),
            added_cond_kwargs=self.added_conditions(conditions),
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]

    def _residuals(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
        """Return what a ControlNet adds to the UNet's skips and to its middle; None each without one."""
        if CONTROL not in conditions:
            return None, None
        further = self.added_conditions(conditions) or {}
        down, middle = model[CONTROLNET](
            of_controlled(conditions, latents),
            of_controlled(conditions, timesteps),
            encoder_hidden_states=of_controlled(conditions, conditions["prompt_embeds"]),
            controlnet_cond=conditions[CONTROL],
            added_cond_kwargs={name: of_controlled(conditions, each) for name, each in further.items()},
            return_dict=False,
        )
        *skips, last = added([*down, middle], conditions, len(latents))
        return skips, last

    def recomputed_blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return [
            block
            for name, block in denoiser.named_modules()
            # diffusers 0.42.1 leaves out the first one of the middle.
            if name.split(".")[-2:-1] in (["resnets"], ["transformer_blocks"])
            and name != "mid_block.resnets.0"
        ]

    def resembles(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        down = re.compile(r"attn2[._]to_[kv].*(lora_A|down)\.weight$")
        widths = {shape[1] for name, shape in shapes.items() if down.search(name)}
        return super().resembles(shapes) and widths <= set(self.text_widths)

    def checkpoint(self, component: str, tensors: Tensors, settings: Settings) -> dict[str, torch.Tensor]:
        if component == "unet":
            return unet_checkpoint(tensors, settings)
        if component == "vae":
            return autoencoder_checkpoint(tensors, settings)
        return self.encoder_checkpoint(component, tensors, settings)

    def encoder_checkpoint(
        self, component: str, tensors: Tensors, settings: Settings
    ) -> dict[str, torch.Tensor]:
        """Return a text encoder's tensors; see `checkpoint`."""
        raise NotImplementedError

    def comfyui_layer(self, component: str, layer: str) -> tuple[str, int, int]:
        prefix = self.kohya_encoder(component) if component in self.trainable_encoders else "lora_unet"
        return f"{prefix}_{layer.replace('.', '_')}", 0, 1

    def added_conditions(self, conditions: Conditions) -> dict[str, torch.Tensor] | None:
        """Return further conditions, by diffusers' names."""
        return None

    def guidance_embedded(self, denoiser: Denoiser) -> bool:
        return denoiser.config.get("time_cond_proj_dim") is not None

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return self.guidance_embedded(getattr(pipeline, self.denoiser))  # latent consistency models

    def guidance_embedding(
        self, denoiser: Denoiser, latents: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor | None:
        """Return the sinusoidal embedding of N guidance scales: N x `time_cond_proj_dim`.

        It embeds the scale minus 1, for a UNet that was distilled with guidance, as latent consistency models
        are (arXiv 2310.04378); None for other UNets.
        """
        if not self.guidance_embedded(denoiser):
            return None
        from diffusers.models.embeddings import get_timestep_embedding

        scale = conditions.get("guidance", latents.new_ones(len(latents)))
        size = denoiser.config.time_cond_proj_dim
        # As in time embeddings with sines first and 1 / 10,000 as the last frequency.
        embedding = get_timestep_embedding(1000 * (scale.float() - 1), size, downscale_freq_shift=1)
        return embedding.to(latents.dtype)
