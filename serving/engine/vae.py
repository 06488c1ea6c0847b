"""The VAE calls between denoising steps: initial images and references become latents, latents pixels.

An image-to-image row begins with the noised latents of its image (SDEdit, arXiv 2108.01073). Finished and
preview latents are decoded one chunk at a time.
"""

from collections.abc import Sequence

import torch

from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.diffusion.sampling import decode_latents, encode_pictures, encode_references
from serving.engine.cpu_workers import CPUWorkers
from serving.engine.rows import Row
from serving.engine.scheduler import Decoding, Encoding


class Decoder:
    """Decoder that delivers the images.

    Args:
        workers: CPU workers that share a chunk.
    """

    def __init__(self, pipeline: Pipeline, *, workers: CPUWorkers) -> None:
        self.pipeline, self.workers = pipeline, workers
        self.pictures = 0  # images decoded, without previews

    def decode(self, chunk: list[Decoding]) -> None:
        """Decode rows of one size, and deliver the images."""
        latents = torch.stack([each.latents for each in chunk])
        if family_of(self.pipeline).codec.keeps_state:
            decoded = self.workers.together(lambda: decode_latents(self.pipeline, latents))
        else:
            decoded = self.workers.apart(
                lambda part: decode_latents(self.pipeline, latents[part]), len(chunk)
            )
        pictures = decoded.permute(0, 2, 3, 1).contiguous()
        for each, pixels in zip(chunk, pictures.unbind(), strict=True):
            if each.last:
                self.pictures += 1
                each.row.succeed(pixels)
                continue
            assert each.row.on_preview is not None
            try:
                each.row.on_preview(each.done, pixels)
            except Exception as error:  # the caller's code, which must not fail other rows of the chunk
                each.row.fail(error)


def encode(pipeline: Pipeline, chunk: Sequence[Encoding], device: str) -> None:
    """Encode pictures of one kind: set their rows' initial latents, or the latents of their references."""
    pixels = torch.stack([each.pixels for each in chunk]).permute(0, 3, 1, 2)
    if chunk[0].number is None:
        _set_initial_latents(pipeline, [each.row for each in chunk], pixels, device)
        return
    for each, latents in zip(chunk, encode_references(pipeline, pixels, device), strict=True):
        assert each.number is not None
        each.row.references[each.number] = latents


def _set_initial_latents(pipeline: Pipeline, rows: Sequence[Row], pixels: torch.Tensor, device: str) -> None:
    """Set the initial latents of rows of one size, by their images: uint8, N x 3 x height x width.

    As in diffusers' pipelines, a row's generator draws the posterior sample first, then the noise that is
    added.
    """
    codec = family_of(pipeline).codec
    draws = [_two_draws(row.request.seed, codec, tuple(row.latents.shape)) for row in rows]
    posterior, noise = (torch.stack(column).to(device) for column in zip(*draws, strict=True))
    latents = encode_pictures(pipeline, pixels, posterior)
    for i, row in enumerate(rows):
        row.latents = row.schedule.image_scale * latents[i] + row.schedule.noise_scale * noise[i]


def _two_draws(seed: int, codec: Codec, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn((1, *codec.unpacked_shape(shape)), generator=generator)[0]
    return first, torch.randn((1, *shape), generator=generator)[0]
