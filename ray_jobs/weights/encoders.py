"""Autoencoder and text encoders, which turn images and captions into the denoiser's training inputs."""

import numpy as np
import torch

from ray_jobs.diffusion.families import Captions, family_of
from ray_jobs.diffusion.families.family import MASK_PIXELS
from ray_jobs.diffusion.families.text import NULL, Pictures
from ray_jobs.diffusion.precision import cast
from ray_jobs.diffusion.sampling import cut_out
from ray_jobs.weights.loading import read_pipeline
from ray_jobs.weights.model_files import not_encoders


class Encoders:
    """The autoencoder and all text encoders of a model; its denoiser is not loaded.

    Args:
        base: folder or hub name of a model in diffusers' format.
        device: device to run on.
        dtype, text_quantization: see `read_pipeline`.

    Raises:
        ValueError: the pipeline belongs to no known family.
    """

    def __init__(
        self,
        base: str,
        *,
        revision: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        text_quantization: str | None = None,
    ) -> None:
        pipeline = read_pipeline(
            base,
            revision=revision,
            without=not_encoders(),
            dtype=dtype,
            text_quantization=text_quantization,
        )
        self.pipeline = pipeline.to(device)
        self.family = family_of(self.pipeline)
        self.device = device
        self.pipeline.vae.requires_grad_(False).eval()

    @torch.no_grad()
    def encode_pictures(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the autoencoder's posterior for N images.

        Args:
            pixels: uint8, N x H x W x 3.

        Returns:
            Mean and log-variance, float32, N x C x ..., on the CPU, neither packed nor scaled (see `Codec`).
        """
        pictures = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, logvar = self.family.codec.posterior(self.pipeline.vae, pictures)
        return mean.cpu(), logvar.cpu()

    @torch.no_grad()
    def encode_masked(self, masked: np.ndarray) -> dict[str, torch.Tensor]:
        """Return what training needs of N pictures of which a part is to be painted, on the CPU.

        They are `masked_mean` and `masked_logvar`, as of `encode_pictures`, and `MASK_PIXELS`; nothing if the
        model paints no masks.

        Args:
            masked: uint8, N x H x W x 4: colours, and 0 in the alpha channel where they are to be painted.
        """
        if not self.family.paints_masks:
            return {}
        pictures, mask = cut_out(torch.from_numpy(masked).to(self.device).permute(0, 3, 1, 2))
        mean, logvar = self.family.codec.posterior(self.pipeline.vae, pictures)
        return {"masked_mean": mean.cpu(), "masked_logvar": logvar.cpu(), MASK_PIXELS: mask.cpu()}

    def encode_captions(self, captions: list[str], *, negative: bool = False) -> Captions:
        """Return the family's columns of tokens (for training text encoders) and of embeddings.

        Both are by name, on the CPU; floats are float32.

        Args:
            negative: encode them as negative prompts.
        """
        return self._captions(captions, (), negative=negative)

    def encode_shown(self, captions: list[str], references: np.ndarray) -> Captions:
        """Return the same of captions with reference pictures that the text encoders see, and beside them,
        with names that begin with `NULL`, the embeddings without the captions.

        Args:
            references: uint8, N x R x h x w x 3.
        """
        pictures = [torch.from_numpy(each).permute(0, 3, 1, 2) for each in references.swapaxes(0, 1)]
        found = self._captions(captions, pictures)
        null = self._captions([""] * len(captions), pictures, negative=True)
        return found | {NULL + name: null[name] for name in self.family.text.embeds}

    @torch.no_grad()
    def _captions(self, captions: list[str], pictures: Pictures, *, negative: bool = False) -> Captions:
        text = self.family.text
        written = text.as_negative if negative else text.as_prompt
        tokens = text.tokenize_shown(self.pipeline, [written(caption) for caption in captions], pictures)
        placed = {name: ids.to(self.device) for name, ids in tokens.items()}
        embeds = text.embed(text.present(self.pipeline), placed)
        found = {name: ids for name, ids in tokens.items() if name in text.tokens}
        return found | {name: cast(tensor, torch.float32).cpu() for name, tensor in embeds.items()}
