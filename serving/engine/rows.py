"""Rows: pictures on their way through the engine."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple

import torch

from ray_jobs.diffusion.families import Captions, family_of
from ray_jobs.diffusion.solvers import Schedule
from serving.engine.batched_lora import Adapter


@dataclass(frozen=True, eq=False)
class Request:
    """One picture to draw, or to draw anew from another."""

    prompt: str
    seed: int
    steps: int
    guidance_scale: float  # 1: off; where the denoiser is told its guidance, what it is told
    negative_prompt: str | None = None  # None: as diffusers without one
    height: int | None = None  # pixels; None: the model's own
    width: int | None = None
    adapter: str | None = None  # None: the base alone
    previews: int = 0  # unfinished pictures on the way, evenly spaced
    image: torch.Tensor | None = None  # to begin with: uint8, height x width x 3
    strength: float = 1.0  # with an image, in (0, 1]: the share of the steps that is made, the last ones
    zero_terminal_snr: bool = False  # the adapter was trained to a last step of pure noise


class Drawing(NamedTuple):
    """A finished picture."""

    pixels: torch.Tensor  # uint8, height x width x 3, on the CPU
    waited_s: float  # from its submission to its first step
    total_s: float  # from its submission to now


OnPreview = Callable[[int, torch.Tensor], object]  # steps done; uint8, height x width x 3


def check_request(
    request: Request, size: tuple[int, int], pipeline: Any, *, with_adapters: bool, max_side: int
) -> None:
    """Raise ValueError, naming the field, for what a model cannot draw: in a batch it would harm others.

    Args:
        size: height and width, pixels.
        max_side: pixels, of the longer side.
    """
    family = family_of(pipeline)
    denoiser = getattr(pipeline, family.denoiser)
    least = family.size_multiple(pipeline.vae.config, denoiser.config)
    most = family.max_side(pipeline.vae.config, denoiser.config)
    for field_name, pixels in zip(("height", "width"), size, strict=True):
        if pixels < least or pixels % least or (most and pixels > most):
            limit = f" up to {most}" if most else ""
            raise ValueError(f"{field_name}: {pixels}; this model draws multiples of {least}{limit} pixels")
        if pixels > max_side:
            raise ValueError(f"{field_name}: {pixels}; pictures of up to {max_side} pixels a side are drawn")
    _check_image(request, size)
    if request.steps < 1:
        raise ValueError(f"steps: {request.steps}; at least one is needed")
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"seed: {request.seed}; it is from 0 to 2^63 - 1")
    if not isfinite(request.guidance_scale) or request.guidance_scale < 1:
        raise ValueError(f"guidance_scale: {request.guidance_scale}; 1 is off, and the least")
    if request.negative_prompt is not None and family.distilled_guidance(denoiser):
        raise ValueError("negative_prompt: this model is told its guidance and has no negative prompt")
    for text in (request.prompt, request.negative_prompt or ""):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("prompt: it holds half of a surrogate pair, which is no text")
    if request.adapter is not None and not with_adapters:
        raise ValueError(f"adapter: {request.adapter!r}; this model is served without adapters")


def _check_image(request: Request, size: tuple[int, int]) -> None:
    if not 0 < request.strength <= 1:
        raise ValueError(f"strength: {request.strength}; it is above 0 and at most 1")
    image = request.image
    if image is None and request.strength != 1:
        raise ValueError(f"strength: {request.strength}; it is of an image, and there is none")
    if image is not None and (image.dtype != torch.uint8 or image.shape != (*size, 3)):
        raise ValueError(
            f"image: {tuple(image.shape)} of {image.dtype}; uint8, {size[0]} x {size[1]} x 3 is needed, as "
            "serving.replica.image_input.read_picture makes it"
        )


@dataclass(eq=False)
class Row:
    """A request and how far it is."""

    request: Request
    schedule: Schedule
    size: tuple[int, int]  # height and width, pixels
    arrival: int  # counts requests
    on_preview: OnPreview | None
    future: Future[Drawing] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    waited_s: float = 0.0
    adapter: Adapter | None = None  # once it is in memory
    captions: Captions = field(default_factory=dict)
    null_captions: Captions | None = None  # of rows with classifier-free guidance
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    clean: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # as predicted by the last step
    earlier: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # outputs, if the solver takes any
    deep: torch.Tensor | None = None  # features that the next step takes, with guidance those of both passes
    done: int = 0  # steps
    last_call: int = 0  # of the denoiser: in which it took a step, or before which it joined

    @property
    def kind(self) -> "Kind":
        return self.size, self.deep is not None

    @property
    def finished(self) -> bool:
        return self.done == len(self.schedule)

    @property
    def shows_preview(self) -> bool:
        """Whether the unfinished picture is shown after the steps that are done."""
        count, steps = self.request.previews, len(self.schedule)
        return count > 0 and self.done in {steps * i // (count + 1) for i in range(1, count + 1)}

    def fail(self, error: Exception) -> None:
        """Answer with an error, unless there is an answer."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def succeed(self, pixels: torch.Tensor) -> None:
        """Answer with the picture, unless there is an answer."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_result(Drawing(pixels, self.waited_s, time.monotonic() - self.submitted))


Kind = tuple[tuple[int, int], bool]  # of rows that may share a call: the size, and whether features are given
