"""Facet of a family: from pixels to latents and back."""

from copy import copy

import torch

from ray_jobs.diffusion.protocols import Autoencoder, Settings

WHOLE = 2 << 20
"""Pixels of the largest image that is decoded whole.

Buckets of 1024 x 1024 reach a little above 1 << 20, and Qwen-Image's own images are of 1328 x 1328.
"""
TILE = 1024  # pixels of a tile's side: an image takes no more memory than one of 1024 x 1024
OVERLAP = 256  # pixels that neighbouring tiles share, and in which one fades into the other


def is_tiled(height: int, width: int) -> bool:
    """Return whether an image of a size, in pixels, is decoded in tiles."""
    return height * width > WHOLE


class Codec:
    """An autoencoder with a Gaussian posterior, and the form of its latents that the denoiser works on.

    This class is for diffusers' AutoencoderKL; latents are N x C x any space. The autoencoder's own latents
    become the denoiser's by `pack`, which changes the shape, and then by shift and scale. `config` is an
    autoencoder's configuration.
    """

    keeps_state: bool = False
    """Whether the autoencoder's modules change in a call, so that two threads would mix up their pictures."""

    def channels(self, config: Settings) -> int:
        """Return the number of channels of the autoencoder's latents."""
        return int(config["latent_channels"])

    def latent_pixels(self, config: Settings) -> int:
        """Return the side of a latent in pixels."""
        return int(2 ** (len(config["block_out_channels"]) - 1))

    def patch(self, denoiser: Settings) -> int:
        """Return the side of a denoiser's patches in latents, from the denoiser's configuration."""
        return 1

    def size_multiple(self, config: Settings, denoiser: Settings) -> int:
        """Return the pixel count that the sides of an image must be multiples of."""
        return self.latent_pixels(config) * self.patch(denoiser)

    def max_side(self, config: Settings, denoiser: Settings) -> int | None:
        """Return the longest side, in pixels, that the denoiser has positions for; None for no limit."""
        return None

    def max_patches(self, denoiser: Settings) -> int | None:
        """Return the most patches of an image that is not square; None for no limit."""
        return None

    def shape(self, config: Settings, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of an image's latents, C x ..., as the denoiser receives them."""
        side = self.latent_pixels(config)
        return self.channels(config), height // side, width // side

    def in_tiles(self, autoencoder: Autoencoder, height: int, width: int) -> Autoencoder:
        """Return the autoencoder; for images of more than `WHOLE` pixels, one that works tile by tile.

        Each tile is normalised by itself and attends to itself only, so that the result differs slightly:
        with `models/emoji-base`, at a quarter of these sizes, by 1.8 of 255 levels on average, no further
        from the original than whole (5.9 instead of 6.3; tests/unit/test_tiles.py).

        The autoencoder in tiles is a copy with the same layers: diffusers' switch is an attribute of the
        module, which other threads use for images of other sizes, and it goes by the longer side, not by the
        area.
        """
        if not is_tiled(height, width):
            return autoencoder
        tiled = copy(autoencoder)
        if hasattr(tiled, "tile_overlap_factor"):  # AutoencoderKL and FLUX.2's
            tiled.enable_tiling()
            tiled.tile_sample_min_size = TILE
            tiled.tile_latent_min_size = TILE // self.latent_pixels(tiled.config)
            tiled.tile_overlap_factor = OVERLAP / TILE
        else:
            tiled.enable_tiling(TILE, TILE, TILE - OVERLAP, TILE - OVERLAP)
        return tiled

    def posterior(self, autoencoder: Autoencoder, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log-variance of the autoencoder's posterior: float32, N x C x ..., unscaled.

        The image is encoded whole, unless the autoencoder is one of `in_tiles`.

        Args:
            pixels: float, N x 3 x height x width, in [-1, 1].
        """
        posterior = autoencoder.encode(pixels.to(autoencoder.dtype)).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    def decode(self, autoencoder: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
        """Return the pixels of unscaled, unpacked latents: float, N x 3 x height x width, around [-1, 1]."""
        return autoencoder.decode(latents, return_dict=False)[0]

    def scale(self, autoencoder: Autoencoder) -> tuple[torch.Tensor, torch.Tensor]:
        """Return shift and scale of packed latents: the denoiser's are (packed - shift) * scale.

        The configuration has `scaling_factor` and optionally either `shift_factor`, or both `latents_mean`
        and `latents_std` with one number per channel (some Stable Diffusion XL models; Qwen-Image has only
        these two).

        Returns:
            float32, each C, or 1 if all channels share the value.
        """
        config = autoencoder.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:  # diffusers takes both or neither
            mean, std = [config.get("shift_factor") or 0.0], [1.0]
        shift, spread = (torch.tensor(values).flatten() for values in (mean, std))
        return shift, config.get("scaling_factor", 1.0) / spread

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Bring the autoencoder's latents into the shape that the denoiser works on."""
        return latents

    def unpack(self, latents: torch.Tensor) -> torch.Tensor:
        """Inverse of `pack`."""
        return latents

    def noise(self, generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
        """Return standard normal noise for an image's latents, 1 x C x ..., drawn in the pipeline's order.

        Args:
            shape: as from `shape`.
        """
        return torch.randn((1, *shape), generator=generator)

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape, C x ..., that `pack` makes of an image's latents of a shape."""
        return tuple(self.pack(torch.empty((1, *shape), device="meta")).shape[1:])

    def unpacked_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Inverse of `packed_shape`."""
        return tuple(self.unpack(torch.empty((1, *shape), device="meta")).shape[1:])

    def sample(
        self,
        mean: torch.Tensor,
        logvar: torch.Tensor,
        scale: tuple[torch.Tensor, torch.Tensor],
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """Draw latents from the autoencoder's posterior, as the denoiser receives them: float32, N x C x ...

        Sources: Kingma & Welling, arXiv 1312.6114, section 2.4, for the draw; Rombach et al., arXiv
        2112.10752, appendix G, for the scale.

        Args:
            mean, logvar: from `posterior`.
            scale: from `scale`.
            noise: float32, of the shape of `mean`, standard normal.
        """
        return self.normalised(mean + (0.5 * logvar).exp() * noise, scale)

    def normalised(self, latents: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the autoencoder's latents, N x C x ..., as the denoiser receives them.

        Args:
            scale: from `scale`.
        """
        packed = self.pack(latents)
        shift, factor = (per_channel(part.to(packed), packed) for part in scale)
        return (packed - shift) * factor

    def pixels(self, autoencoder: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents of the denoiser to images: uint8, N x 3 x height x width, on the CPU.

        Large images are decoded in tiles, see `in_tiles`.
        """
        shift, factor = (per_channel(part.to(latents), latents) for part in self.scale(autoencoder))
        unscaled = self.unpack(latents / factor + shift).to(autoencoder.dtype)
        side = self.latent_pixels(autoencoder.config)
        autoencoder = self.in_tiles(autoencoder, unscaled.shape[-2] * side, unscaled.shape[-1] * side)
        pixels = self.decode(autoencoder, unscaled).float()
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def per_channel(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Reshape C values for arithmetic with latents, N x C x ..."""
    return values.reshape(1, -1, *[1] * (latents.dim() - 2))
