"""The batched denoising loop behind the endpoint. Pure PyTorch: no Ray, no HTTP.

Each row draws its own noise and carries its own guidance scale, so a picture does not depend on the
requests that it shares a batch with, and is the one that plain diffusers draws from the same seed.
"""

from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch

from ray_jobs.diffusion.families import Captions, family_of
from ray_jobs.diffusion.loading import encode_prompts
from ray_jobs.diffusion.sampling import decode_latents, initial_noise, sample_latents, whole_pictures

# Their steps draw fresh noise, which a batch cannot give each row from its own generator.
STOCHASTIC_SCHEDULERS = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
)


class Engine:
    """Draws pictures with a pipeline of any family, many requests at once.

    Args:
        pipeline: as `load_pipeline` gives it; moved to `device`.
        device: of PyTorch.
        cached_prompts: prompt embeddings that are kept, the least recently used is dropped first.

    Raises:
        ValueError: if the pipeline's scheduler draws noise while it steps.
    """

    def __init__(self, pipeline: Any, *, device: str = "cpu", cached_prompts: int = 256):
        scheduler, options = type(pipeline.scheduler).__name__, pipeline.scheduler.config
        if (
            scheduler in STOCHASTIC_SCHEDULERS
            or "sde" in options.get("algorithm_type", "")
            or options.get("stochastic_sampling")
        ):
            raise ValueError(
                f"scheduler: {scheduler} draws noise while it steps, so a seed would not fix a picture "
                "in a batch; save the model with DDIMScheduler or DPMSolverMultistepScheduler"
            )
        self.pipeline, self.family = pipeline.to(device), family_of(pipeline)
        self.device = device
        self.cached_prompts = cached_prompts
        self._possible_steps: set[int] = set()
        self._embeddings: OrderedDict[str, Captions] = OrderedDict()

    @property
    def resolution(self) -> int:
        """Pixels a side."""
        return int(self.family.sample_size(self.pipeline) * self.pipeline.vae_scale_factor)

    def check_steps(self, num_steps: int) -> None:
        """Raise ValueError if the scheduler cannot denoise in so many steps (some need a few at least)."""
        if num_steps in self._possible_steps:
            return
        side = self.family.sample_size(self.pipeline)
        try:
            self.family.set_timesteps(deepcopy(self.pipeline.scheduler), num_steps, (side, side), "cpu")
        except (ValueError, IndexError) as error:
            scheduler = type(self.pipeline.scheduler).__name__
            raise ValueError(f"{scheduler} cannot draw in {num_steps} steps; ask for more") from error
        self._possible_steps.add(num_steps)

    def embed(self, prompts: Sequence[str]) -> Captions:
        """Embeddings from the cache, the missing ones encoded in one batch: N x ..., by name."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if missing:
            encoded = encode_prompts(self.pipeline, missing)
            for row, prompt in enumerate(missing):
                self._embeddings[prompt] = {name: embeds[row] for name, embeds in encoded.items()}
        for prompt in prompts:
            self._embeddings.move_to_end(prompt)
        rows = {
            name: torch.stack([self._embeddings[prompt][name] for prompt in prompts])
            for name in self.family.embeds
        }
        while len(self._embeddings) > self.cached_prompts:
            self._embeddings.popitem(last=False)
        return rows

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: Sequence[int],
        guidance_scales: Sequence[float],
    ) -> list[torch.Tensor]:
        """Draw N pictures; rows of equal step count are denoised together.

        Args:
            prompts, seeds, steps, guidance_scales: N of each, one a picture.

        Returns:
            N tensors, uint8, height x width x 3, in the order of the arguments.
        """
        pictures: dict[int, torch.Tensor] = {}
        for num_steps in dict.fromkeys(steps):
            rows = [row for row, count in enumerate(steps) if count == num_steps]
            drawn = self._denoise(
                [prompts[row] for row in rows],
                [seeds[row] for row in rows],
                num_steps,
                torch.tensor([guidance_scales[row] for row in rows]),
            )
            pictures.update(zip(rows, drawn, strict=True))
        return [pictures[row] for row in range(len(steps))]

    def _denoise(
        self, prompts: list[str], seeds: list[int], num_steps: int, guidance_scales: torch.Tensor
    ) -> torch.Tensor:
        """One batch, one step count: uint8, N x height x width x 3."""
        pipeline, family, side = self.pipeline, self.family, self.family.sample_size(self.pipeline)
        noise = initial_noise(seeds, (pipeline.vae.config.latent_channels, side, side))
        latents = sample_latents(
            family,
            getattr(pipeline, family.denoiser),
            pipeline.scheduler,
            noise.to(self.device),
            self.embed(prompts),
            self.embed([""]),
            num_steps=num_steps,
            guidance_scale=guidance_scales.to(self.device),
            sizes=whole_pictures(family, len(noise), self.resolution, self.resolution),
        )
        return decode_latents(pipeline.vae, latents).permute(0, 2, 3, 1)
