"""The VAE calls between denoising steps: a request's pictures become latents, latents pixels.

An image-to-image row begins with the noised latents of its image (SDEdit, arXiv 2108.01073). Finished and
preview latents are decoded one chunk at a time.
"""

from collections.abc import Sequence

import torch

from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.families.control import CONTROL
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.diffusion.sampling import (
    control_conditions,
    decode_latents,
    encode_masked,
    encode_pictures,
    encode_references,
)
from serving.engine.blending import Blend, outside_kept, painted_latents
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
                each.row.succeed(_kept(each.row, pixels))
                continue
            assert each.row.on_preview is not None
            try:
                each.row.on_preview(each.done, _kept(each.row, pixels))
            except Exception as error:  # the caller's code, which must not fail other rows of the chunk
                each.row.fail(error)


def _kept(row: Row, pixels: torch.Tensor) -> torch.Tensor:
    """Return a row's decoded pixels; where it paints by blending, with its picture's outside the mask."""
    if row.blend is None:
        return pixels
    assert row.request.masked is not None
    return outside_kept(pixels, row.request.masked)


def encode(pipeline: Pipeline, chunk: Sequence[Encoding], device: str) -> None:
    """Encode pictures of one kind: set what their rows begin with, look at, follow, or paint into."""
    pixels = torch.stack([each.pixels for each in chunk]).permute(0, 3, 1, 2)
    rows = [each.row for each in chunk]
    if chunk[0].which == "image":
        _set_initial_latents(pipeline, rows, pixels, device)
        return
    if chunk[0].which == "control":
        for row, control in zip(rows, control_conditions(pipeline, pixels, device)[CONTROL], strict=True):
            row.control = control
        return
    if chunk[0].which == "masked":
        _set_painting(pipeline, rows, pixels, device)
        return
    for each, latents in zip(chunk, encode_references(pipeline, pixels, device), strict=True):
        assert isinstance(each.which, int)
        each.row.references[each.which] = latents


def _set_initial_latents(pipeline: Pipeline, rows: Sequence[Row], pixels: torch.Tensor, device: str) -> None:
    """Set the initial latents of rows of one size, by their images: uint8, N x 3 x height x width.

    As in diffusers' pipelines, a row's generator draws the posterior sample first, then the noise that is
    added.
    """
    draws = [_draws(pipeline, row) for row in rows]
    posterior, noise, _ = (torch.stack(column).to(device) for column in zip(*draws, strict=True))
    latents = encode_pictures(pipeline, pixels, posterior)
    for i, row in enumerate(rows):
        row.latents = row.schedule.image_scale * latents[i] + row.schedule.noise_scale * noise[i]
        if len(row.schedule.levels):
            assert row.request.masked is not None
            painted = painted_latents(family_of(pipeline).codec, row.request.masked, tuple(latents[i].shape))
            row.blend = Blend(latents[i], noise[i], painted.to(device))


def _set_painting(pipeline: Pipeline, rows: Sequence[Row], pixels: torch.Tensor, device: str) -> None:
    """Set what rows of one size paint into: uint8, N x 4 x height x width.

    A row's generator draws the masked picture's posterior sample last.
    """
    posterior = torch.stack([_draws(pipeline, row)[2] for row in rows]).to(device)
    conditions = encode_masked(pipeline, pixels, posterior)
    for i, row in enumerate(rows):
        row.painting = {name: each[i] for name, each in conditions.items()}


def _draws(pipeline: Pipeline, row: Row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a row's random numbers in their order: for the posterior, noise, for the masked picture's."""
    shape, family = tuple(row.latents.shape), family_of(pipeline)
    unpacked = family.codec.unpacked_shape(shape)
    generator = torch.Generator().manual_seed(row.request.seed)
    if row.is_controlled and family.draws_control_first:
        torch.randn((1, *unpacked), generator=generator)
    first, noise, last = (
        torch.randn((1, *each), generator=generator)[0] for each in (unpacked, shape, unpacked)
    )
    return first, noise, last
