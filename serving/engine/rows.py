"""The rows that requests become in the engine."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, NamedTuple

import torch

from ray_jobs.diffusion.families import Captions, Conditions, family_of
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.diffusion.sampling import UNGUIDED
from ray_jobs.diffusion.solvers import Schedule
from serving.engine.batched_lora import Adapter
from serving.engine.blending import Blend
from serving.request import ALL_STEPS, Request, RequestError


class Drawing(NamedTuple):
    """A finished image."""

    pixels: torch.Tensor  # uint8, height x width x 3, on the CPU
    waited_s: float  # seconds from submission to the first step
    total_s: float  # seconds from submission to completion


Picture = int | Literal["image", "masked", "control"]
"""A picture of a request that is encoded: a reference by its number, or another one by what it is for."""
OnPreview = Callable[[int, torch.Tensor], object]  # takes the steps done and a uint8 height x width x 3 image


def check_request(
    request: Request, size: tuple[int, int], pipeline: Pipeline, *, with_adapters: bool, max_side: int
) -> None:
    """Raise RequestError if the model cannot serve a request, which would fail its batch.

    Args:
        size: height and width in pixels.
        max_side: maximum length of the longer side in pixels.
    """
    family = family_of(pipeline)
    denoiser = getattr(pipeline, family.denoiser)
    least = family.codec.size_multiple(pipeline.vae.config, denoiser.config)
    most = family.codec.max_side(pipeline.vae.config, denoiser.config)
    for field_name, pixels in zip(("height", "width"), size, strict=True):
        if pixels < least or pixels % least or (most and pixels > most):
            limit = f", at most {most}" if most else ""
            raise RequestError(field_name, f"{pixels}; must be a multiple of {least} pixels{limit}")
        if pixels > max_side:
            raise RequestError(field_name, f"{pixels}; must be at most {max_side} pixels")
    patches = family.codec.max_patches(denoiser.config)
    if patches and size[0] != size[1] and size[0] * size[1] > patches * least**2:
        limit = f"at most {patches * least**2:,} pixels unless they are square"
        raise RequestError("height", f"{size[0]} x {size[1]}; this model's images have {limit}")
    _check_image(request, size)
    if len(request.references) > family.max_references:
        takes = f"at most {family.max_references}" if family.max_references else "none"
        raise RequestError("references", f"{len(request.references)} given; this model takes {takes}")
    _check_masked(request, size, family.paints_masks)
    _check_control(request, size, is_controlled=family.is_controlled(family.model(pipeline)))
    for picture in request.references:
        _check_reference(picture, least, max_side)
    if request.steps < 1:
        raise RequestError("steps", f"{request.steps}; must be at least 1")
    if not 0 <= request.seed < 2**63:
        raise RequestError("seed", f"{request.seed}; must be from 0 to 2^63 - 1")
    if not isfinite(request.guidance_scale) or request.guidance_scale < 1:
        raise RequestError(
            "guidance_scale", f"{request.guidance_scale}; must be at least 1, which turns guidance off"
        )
    if request.guidance_scale > 1 and not family.has_guidance(pipeline.config):
        raise RequestError("guidance_scale", f"{request.guidance_scale}; {UNGUIDED}, which is 1")
    if request.negative_prompt is not None and family.guidance_embedded(denoiser):
        raise RequestError(
            "negative_prompt", "not supported: this model takes the guidance scale as an input"
        )
    if request.negative_prompt is not None and family.helpers:
        raise RequestError(
            "negative_prompt", "not supported: guidance leads this model away from drawing without a caption"
        )
    for text in (request.prompt, request.negative_prompt or ""):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise RequestError("prompt", "contains an unpaired surrogate, which is not valid Unicode")
    _check_interval(request, family.guidance_embedded(denoiser))
    _check_adapters(request, with_adapters)


def _check_interval(request: Request, guidance_embedded: bool) -> None:
    start, end = request.guidance_interval
    if not 0 <= start <= end <= 1:
        raise RequestError("guidance_interval", f"{start}, {end}; must be two shares of the steps, in order")
    if (start, end) == ALL_STEPS:
        return
    if guidance_embedded:
        reason = "not supported: this model takes the guidance scale as an input"
        raise RequestError("guidance_interval", reason)
    if request.guidance_scale == 1:
        raise RequestError("guidance_interval", "needs a guidance scale above 1")


def _check_adapters(request: Request, with_adapters: bool) -> None:
    if request.adapter is not None and not with_adapters:
        raise RequestError("adapter", f"{request.adapter!r}; this model is served without adapters")
    if request.adapters and not with_adapters:
        raise RequestError("adapters", "given; this model is served without adapters")
    if request.adapters and request.adapter is not None:
        raise RequestError("adapters", f"given beside adapter {request.adapter!r}; list it among them")
    names = [each.name for each in request.adapters]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RequestError("adapters", f"{twice!r} is listed twice; add its scales")
    for name, scale in request.adapters:
        if not isfinite(scale):
            raise RequestError("adapters", f"{name!r} has the scale {scale}; it must be finite")


def _check_image(request: Request, size: tuple[int, int]) -> None:
    if not 0 < request.strength <= 1:
        raise RequestError("strength", f"{request.strength}; must be above 0 and at most 1")
    image = request.image
    if image is None and request.strength != 1:
        raise RequestError("strength", f"{request.strength}; needs an initial image")
    if image is not None and (image.dtype != torch.uint8 or image.shape != (*size, 3)):
        reason = (
            f"{tuple(image.shape)} of {image.dtype}; uint8, {size[0]} x {size[1]} x 3 is needed, as "
            "serving.replica.image_input.read_picture makes it"
        )
        raise RequestError("image", reason)


def _check_masked(request: Request, size: tuple[int, int], paints_masks: bool) -> None:
    masked = request.masked
    if masked is None:
        return
    if not paints_masks and request.image is None:
        reason = "given without image; this model paints into masks only by blending with the picture"
        raise RequestError("masked", reason)
    if masked.dtype != torch.uint8 or masked.shape != (*size, 4):
        reason = (
            f"{tuple(masked.shape)} of {masked.dtype}; uint8, {size[0]} x {size[1]} x 4 is needed, as "
            "serving.replica.image_input.read_masked makes it"
        )
        raise RequestError("masked", reason)


def _check_control(request: Request, size: tuple[int, int], *, is_controlled: bool) -> None:
    control, scale = request.control, request.control_scale
    if not isfinite(scale) or scale < 0:
        raise RequestError("control_scale", f"{scale}; must be at least 0, which turns the control off")
    if control is None:
        if scale != 1:
            raise RequestError("control_scale", f"{scale}; needs a control image")
        return
    if not is_controlled:
        raise RequestError("control", "given; this model follows none")
    if control.dtype != torch.uint8 or control.shape != (*size, 3):
        reason = (
            f"{tuple(control.shape)} of {control.dtype}; uint8, {size[0]} x {size[1]} x 3 is needed, as "
            "serving.replica.image_input.read_picture makes it"
        )
        raise RequestError("control", reason)


def _check_reference(picture: torch.Tensor, least: int, max_side: int) -> None:
    fits = picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == torch.uint8
    if not fits or any(side < least or side % least or side > max_side for side in picture.shape[:2]):
        reason = (
            f"{tuple(picture.shape)} of {picture.dtype}; uint8, height x width x 3 is needed, both multiples "
            f"of {least} pixels and at most {max_side}, as serving.replica.image_input makes it"
        )
        raise RequestError("references", reason)


class Kind(NamedTuple):
    """Properties that rows of one denoiser call share."""

    size: tuple[int, int]  # height and width in pixels
    references: tuple[tuple[int, ...], ...]  # their heights and widths
    deep: bool  # True with cached features

    @property
    def pixels(self) -> int:
        """Return the pixels of a row's image and references."""
        return sum(height * width for height, width in (self.size, *self.references))


@dataclass(eq=False)
class Row:
    """A request and its progress."""

    request: Request
    schedule: Schedule
    size: tuple[int, int]  # height and width in pixels
    arrival: int  # sequence number of the request
    on_preview: OnPreview | None
    guided: bool = False  # True with classifier-free guidance: a denoiser call has the row twice
    future: Future[Drawing] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    waited_s: float = 0.0
    adapter: Adapter | None = None  # set once it is in memory
    captions: Captions = field(default_factory=dict)
    null_captions: Captions | None = None  # set for guided rows
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    clean: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # as predicted by the last step
    earlier: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # past outputs, for some solvers
    deep: torch.Tensor | None = None  # deep features for the next step; with guidance, of both passes
    masked: torch.Tensor | None = None  # as of the request; None where the model paints into no masks
    unencoded: list[Picture] = field(default_factory=list)
    references: dict[int, torch.Tensor] = field(default_factory=dict)  # latents, C x ..., by number
    blend: Blend | None = None  # set where a model without masks paints into one
    control: torch.Tensor | None = None  # what a ControlNet looks at, C x ...
    painting: Conditions = field(default_factory=dict)  # conditions of the masked picture, without rows
    done: int = 0  # steps done
    last_call: int = 0  # denoiser call in which the row last stepped, or after which it joined

    @property
    def is_controlled(self) -> bool:
        """Whether a ControlNet has a say in the row; with a scale of 0 it is off."""
        return self.request.control is not None and self.request.control_scale > 0

    @property
    def kind(self) -> Kind:
        sizes = tuple(tuple(picture.shape[:2]) for picture in self.request.references)
        return Kind(self.size, sizes, self.deep is not None)

    @property
    def pixels(self) -> int:
        """Pixels of a denoiser call that the row takes, with those of its references."""
        return self.kind.pixels * (2 if self.guided else 1)

    @property
    def guides(self) -> bool:
        """True if the next step has classifier-free guidance, for which the denoiser sees the row twice."""
        start, end = self.request.guidance_interval
        steps = self.request.steps
        step = self.done + max(0, steps - len(self.schedule))  # of those that begin from noise
        return self.guided and int(start * steps) <= step and (step < int(end * steps) or end == 1)

    @property
    def finished(self) -> bool:
        return self.done == len(self.schedule)

    @property
    def shows_preview(self) -> bool:
        """True if a preview is due after the steps done so far."""
        count, steps = self.request.previews, len(self.schedule)
        return count > 0 and self.done in {steps * i // (count + 1) for i in range(1, count + 1)}

    def fail(self, error: Exception) -> None:
        """Answer with an error, unless the row is already answered."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def succeed(self, pixels: torch.Tensor) -> None:
        """Answer with the image, unless the row is already answered."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_result(Drawing(pixels, self.waited_s, time.monotonic() - self.submitted))
