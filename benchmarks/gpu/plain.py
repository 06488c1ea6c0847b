"""The rival of training: diffusers' example loops, reduced to what a step does, from cached latents.

What is trained is fp32 under autocast, as with `--mixed_precision bf16`; frozen weights are bf16. All rows
lie on the device, so that it loads nothing, and it keeps no averaged weights.
"""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import mse_loss

from benchmarks.gpu.shapes import Shape
from benchmarks.train.rivals import Optimizing, ddpm_scheduler, diffusion_loss
from ray_jobs.config import TrainConfig
from ray_jobs.diffusion.families import Family
from ray_jobs.diffusion.finetuning import add_lora


class Plain(Optimizing):
    """A plain loop over one batch.

    Args:
        rows: from `Shape.rows`.
    """

    def __init__(self, shape: Shape, train: TrainConfig, rows: dict[str, torch.Tensor], device: str) -> None:
        from diffusers.training_utils import cast_training_params

        family = shape.family
        lora = train.method == "lora"
        pipeline = shape.trainable(device, torch.bfloat16 if lora else torch.float32)
        denoiser: Any = getattr(pipeline, family.denoiser)
        if lora:
            targets = list(family.trainable[family.denoiser])
            add_lora(
                denoiser, rank=train.lora.rank, alpha=train.lora.alpha, dropout=0.0, target_modules=targets
            )
            cast_training_params(denoiser)
        else:
            denoiser.requires_grad_(True)
        super().__init__(denoiser.train(), train)
        self.family: Family = family
        self.device, self.rows = device, {name: each.to(device) for name, each in rows.items()}
        self.shift, self.factor = (float(each) for each in family.codec.scale(pipeline.vae))
        self.guided = family.guidance_embedded(denoiser)
        self.scheduler = ddpm_scheduler(pipeline) if family.is_unet else None

    def forward(self) -> torch.Tensor:
        """Return the loss of the batch, with new noise."""
        mean, logvar = self.rows["latents_mean"].float(), self.rows["latents_logvar"].float()
        latents = (mean + (0.5 * logvar).exp() * torch.randn_like(mean) - self.shift) * self.factor
        noise = torch.randn_like(latents)
        with torch.autocast(self.device, torch.bfloat16):
            return self._unet(latents, noise) if self.family.is_unet else self._flux(latents, noise)

    def _unet(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        assert self.scheduler is not None
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(latents),), device=self.device)
        unet: Any = self.unet
        if "pooled_prompt_embeds" in self.rows:
            added = {"text_embeds": self.rows["pooled_prompt_embeds"], "time_ids": self.rows["conditioning"]}
            unet = partial(unet, added_cond_kwargs=added)
        embeds = self.rows["prompt_embeds"]
        return diffusion_loss(unet, self.scheduler, latents, noise, timesteps, embeds)

    def _flux(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the loss as diffusers' `train_dreambooth_lora_flux.py` has it, without a weighting."""
        from diffusers import FluxPipeline

        count, channels, height, width = latents.shape
        sigmas = torch.rand(count, device=self.device)
        part = sigmas.reshape(-1, 1, 1, 1)
        embeds = self.rows["prompt_embeds"]
        packed = (count, channels, height, width)
        prediction = self.unet(
            hidden_states=FluxPipeline._pack_latents((1 - part) * latents + part * noise, *packed),
            timestep=sigmas,
            guidance=torch.ones(count, device=self.device) if self.guided else None,
            pooled_projections=self.rows["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=self.device),
            img_ids=FluxPipeline._prepare_latent_image_ids(
                count, height // 2, width // 2, latents.device, torch.float32
            ),
            return_dict=False,
        )[0]
        return mse_loss(prediction.float(), FluxPipeline._pack_latents(noise - latents, *packed).float())

    def passes(self) -> torch.Tensor:
        """Run the batch forward and backward; return its loss."""
        loss = self.forward()
        self.backward(loss)
        return loss.detach()

    def step(self) -> float:
        """Take a step; return its loss, which the examples show at each step."""
        loss = self.passes()
        self.update()
        return float(loss)
