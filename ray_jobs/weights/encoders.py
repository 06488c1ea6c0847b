"""What turns pictures and captions into what the denoiser is trained on: autoencoder and text encoders."""

import numpy as np
import torch

from ray_jobs.diffusion.families import Captions, family_of
from ray_jobs.weights.loading import read_pipeline
from ray_jobs.weights.model_files import NOT_ENCODERS


class Encoders:
    """The autoencoder and all text encoders of a model; its denoiser is not loaded.

    Args:
        base: folder or hub name of a model in diffusers' format.
        device: where they run, in float32.

    Raises:
        ValueError: for a pipeline of no known family.
    """

    def __init__(self, base: str, *, revision: str | None = None, device: str = "cpu") -> None:
        self.pipeline = read_pipeline(base, revision=revision, without=NOT_ENCODERS).to(device)
        self.family = family_of(self.pipeline)
        self.device = device
        self.pipeline.vae.requires_grad_(False).eval()

    @torch.no_grad()
    def encode_pictures(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The autoencoder's posterior.

        Args:
            pixels: uint8, N x H x W x 3.

        Returns:
            Mean and logarithm of the variance, float32, N x C x h x w, on the CPU. Not scaled: a latent is
            (sample - shift_factor) * scaling_factor of the autoencoder's configuration.
        """
        pictures = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = self.pipeline.vae.encode(pictures).latent_dist
        return posterior.mean.float().cpu(), posterior.logvar.float().cpu()

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> Captions:
        """Tokens (int32, for text encoders that are trained) and what the denoiser takes (float32), by name,
        on the CPU."""
        tokens = self.family.tokenize(self.pipeline, captions)
        placed = {name: ids.to(self.device) for name, ids in tokens.items()}
        embeds = self.family.embed(self.family.encoders(self.pipeline), placed)
        return tokens | {name: tensor.float().cpu() for name, tensor in embeds.items()}
