"""Paint into masks with models that have none: what is not to be painted is put back after each step.

Blended latent diffusion (Avrahami et al., arXiv 2206.02779, algorithm 1), as in diffusers' inpainting
pipelines. At the end the picture's own pixels take their places, so that those outside the mask are exact.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import adaptive_max_pool2d

from ray_jobs.diffusion.families.codec import Codec


class Blend(NamedTuple):
    """What a row paints into.

    Attributes:
        picture: latents of the picture, C x ...
        noise: standard normal, of their shape, with which the row began.
        painted: bool, of their shape, True where the row paints.
    """

    picture: torch.Tensor
    noise: torch.Tensor
    painted: torch.Tensor

    def into(self, latents: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Return latents whose other part is the picture's, at their noise level.

        Args:
            level: factors on the picture's latents and on the noise, from `Schedule.levels`.
        """
        image_scale, noise_scale = level.tolist()
        return torch.where(self.painted, latents, image_scale * self.picture + noise_scale * self.noise)


def painted_latents(codec: Codec, masked: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return which latents of a picture are painted: those of which any pixel is.

    Args:
        masked: uint8, height x width x 4, transparent where it is to be painted.
        shape: of the denoiser's latents, C x ...; so is the result, bool.
    """
    unpacked = codec.unpacked_shape(shape)
    hole = (masked[None, None, ..., 3] == 0).float()
    hole = adaptive_max_pool2d(hole, unpacked[-2:])[0, 0].expand(unpacked)
    return codec.pack(hole[None].contiguous())[0] > 0


def outside_kept(pixels: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Return drawn pixels inside a mask, and those of the picture outside: uint8, height x width x 3."""
    colours, alpha = masked.split([3, 1], dim=2)
    return torch.where(alpha == 0, pixels, colours)
