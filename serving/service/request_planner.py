"""Plan a client's request: resolve the version, fill in the server's defaults, one request per image."""

import base64
import binascii
import random
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from ray_jobs.config import ServeConfig
from ray_jobs.registry.models import CANDIDATE, CHAMPION, RegisteredModel
from serving.encoding import Output
from serving.feedback.schemas import new_image_id
from serving.messages import BASE, RoutedRequest, adapter_name, label
from serving.request import ALL_STEPS, Request, ScaledAdapter
from serving.schemas import (
    MAX_SEED,
    STEPS_BY_QUALITY,
    STRENGTH,
    APIError,
    EditRequest,
    ImageRequest,
    VariationRequest,
    width_and_height,
)
from serving.service.given_files import NO_FILES, GivenFiles
from serving.service.registry_watcher import RegistryWatcher
from serving.service.replica_client import ReplicaClient
from serving.service.request_context import RequestContext
from serving.service.routing import Catalogue, UnknownModel

DATA_URL = re.compile(r"^data:[\w./+-]*;base64,")
GUIDANCE_SCALE = 3.0  # default for versions that were registered without one


class RequestPlanner:
    """Planner of requests. Use it from one event loop only.

    Args:
        catalogue: the available versions.
        watcher: reads the registry, if it has not been read yet.
        replicas: report the model's default size.
    """

    def __init__(
        self, settings: ServeConfig, catalogue: Catalogue, watcher: RegistryWatcher, replicas: ReplicaClient
    ) -> None:
        self.settings, self.catalogue = settings, catalogue
        self.watcher, self.replicas = watcher, replicas

    async def find(self, model: str | None, user: str | None = None) -> RegisteredModel | None:
        """Return the version that a request's `model` names; None is the bare base.

        Raises:
            APIError: 404, there is no such model.
        """
        with suppress(UnknownModel):
            return self.catalogue.find(model, user)
        if not self.watcher.polled:
            await self.watcher.poll()
        try:
            return self.catalogue.find(model, user)
        except UnknownModel as error:
            raise APIError(404, str(error), "model", "model_not_found") from None

    async def plan(
        self,
        request: ImageRequest,
        context: RequestContext,
        files: GivenFiles = NO_FILES,
    ) -> list[RoutedRequest]:
        """Return one request per image, with the server's defaults filled in.

        Raises:
            APIError: a field, which is named, is not supported.
        """
        if request.partial_images and not request.stream:
            raise APIError(400, "partial_images: needs stream: true", "partial_images", "invalid_value")
        if request.stream and request.n > 1:
            raise APIError(400, "n: must be 1 with stream: true", "n", "invalid_value")
        context.prompt = request.prompt
        user = request.user or context.key
        adapters = await self._adapters(request, user)
        version = None if adapters and request.control_image is None else await self.find(request.model, user)
        control = _control(request, version)
        width, height = await self._pixels(request.size)
        strength: float | None = None
        references: tuple[bytes, ...] = ()
        assert bool(files.images) == isinstance(request, EditRequest)
        if isinstance(request, EditRequest):
            strength, references = await self._given(request, files)
        seed = random.randint(0, MAX_SEED) if request.seed is None else request.seed
        steps = request.steps or self._steps(request.quality)
        first = Request(
            request.prompt,
            seed,
            steps,
            request.guidance_scale or self._usual_guidance(adapters[0] if adapters else version),
            request.negative_prompt,
            height,
            width,
            previews=min(request.partial_images, steps - 1),  # there are no more intermediate images
            strength=strength or 1.0,
            guidance_interval=_interval(request),
            control_scale=1.0 if request.control_scale is None else request.control_scale,
            adapters=tuple(
                ScaledAdapter(adapter_name(each), chosen.scale)
                for each, chosen in zip(adapters, request.adapters or (), strict=True)
            ),
        )
        routed = RoutedRequest(
            version,
            first,
            files.images[0] if strength else None,
            references,
            files.mask,
            control=control,
            # Edits are not scored: they differ from the published images as much as their input does.
            scored=not files.images and control is None and version in self._compared,
            asked=time.time(),
            fused=self.settings.fuse_champion and version == self.catalogue.champion,
            adapters=adapters,
            output=Output(request.output_format, request.output_compression),
        )
        context.steps, context.n = steps, request.n
        self._name(version, context)
        # Seeds wrap around, so that every seed in an answer is valid in a request.
        return [
            routed._replace(request=replace(first, seed=(seed + i) % (MAX_SEED + 1)), image_id=new_image_id())
            for i in range(request.n)
        ]

    def _steps(self, quality: str | None) -> int:
        """Return the number of steps of a request that names none."""
        most, usual = self.settings.max_steps, self.settings.default_steps
        if quality is None:
            return usual
        return most if quality == "max" else min(most, max(1, round(STEPS_BY_QUALITY[quality] * usual)))

    async def _adapters(self, request: ImageRequest, user: str | None) -> tuple[RegisteredModel, ...]:
        """Return the LoRA versions that a request combines; none if it names a model.

        Raises:
            APIError: 400, a name is unknown, no LoRA version's, or given twice; or a model is named as well.
        """
        if request.adapters is None:
            return ()
        if request.model not in (None, BASE) and request.control_image is None:
            reason = "leave it out beside adapters, which lists all that is applied to the base"
            raise APIError(400, f"model: {reason}", "model", "invalid_value")
        if self.settings.compile:
            reason = "not supported by a server with serve.compile"
            raise APIError(400, f"adapters: {reason}", "adapters", "unsupported_parameter")
        found: list[RegisteredModel] = []
        for number, chosen in enumerate(request.adapters):
            field, reason = f"adapters.{number}.name", ""
            try:
                version = await self.find(chosen.name, user)
            except APIError as error:
                raise APIError(400, f"{field}: {error.message}", field, error.code) from None
            if version is not None and version.control:
                reason = f"{chosen.name!r} follows control images; request it as model, without adapters"
            elif version is None or version.method != "lora":
                reason = f"{chosen.name!r} is no LoRA version; request it as model, without adapters"
            elif version in found:
                reason = f"{label(version)} is listed twice; add its scales"
            if version is None or reason:
                raise APIError(400, f"{field}: {reason}", field, "invalid_value")
            found.append(version)
        return tuple(found)

    @property
    def _compared(self) -> tuple[RegisteredModel | None, ...]:
        """Champion and candidate."""
        return self.catalogue.champion, self.catalogue.candidate

    def _usual_guidance(self, version: RegisteredModel | None) -> float:
        """Return the default guidance scale: the configured one, else the one the version was scored with.
        The bare base uses the champion's."""
        recorded = (version or self.catalogue.champion).guidance_scale
        return self.settings.default_guidance_scale or recorded or GUIDANCE_SCALE

    def _name(self, version: RegisteredModel | None, context: RequestContext) -> None:
        """Set the context's model, version and alias, if it has one."""
        if version is None:
            context.model, context.version = BASE, BASE
            return
        context.model, context.version = version.name, version.version
        for alias, each in ((CHAMPION, self.catalogue.champion), (CANDIDATE, self.catalogue.candidate)):
            if each is not None and label(each) == label(version):
                context.alias = alias

    async def _pixels(self, size: str | None) -> tuple[int | None, int | None]:
        """Return width and height in pixels, None each for the model's own.

        Raises:
            APIError: 400, the size is above the limit.
        """
        if size is None:
            return None, None
        width, height = width_and_height(size)
        own = await self.replicas.traits()
        limit = self.settings.max_side or 2 * max(own)
        if max(width, height) > limit:
            message = (
                f"size: {size} exceeds this server's limit of {limit} pixels per side; the model's default "
                f"is {own.width}x{own.height}"
            )
            raise APIError(400, message, "size", "invalid_value")
        return width, height

    async def _given(self, request: EditRequest, files: GivenFiles) -> tuple[float | None, tuple[bytes, ...]]:
        """Return the strength of an edit that begins with its image, and the references of another.

        Raises:
            APIError: 400, there are too many images, or the mask is missing.
        """
        images, mask = files
        traits = await self.replicas.traits()
        if traits.paints_masks:
            if isinstance(request, VariationRequest):
                reason = "this model paints into masks; send the image with a mask to /v1/images/edits"
                raise APIError(400, f"image: {reason}", "image", "unsupported_parameter")
            if mask is None:
                reason = "missing; this model paints into a PNG's transparent pixels, of the image's size"
                raise APIError(400, f"mask: {reason}", "mask", "invalid_value")
            if len(images) > 1:
                raise _too_many(images, "this model paints into one")
            return request.strength, images
        limit = traits.max_references
        if limit and request.strength is None:
            if len(images) > limit:
                raise _too_many(images, f"this model takes at most {limit}")
            # Into a mask, it paints by blending with the first one.
            return None if mask is None else 1.0, images
        if len(images) > 1:
            reason = "with strength, drawing begins with one" if limit else "drawing begins with one"
            raise _too_many(images, reason)
        return request.strength or (STRENGTH if mask is None else 1.0), ()


def _interval(request: ImageRequest) -> tuple[float, float]:
    start, end = request.guidance_interval or ALL_STEPS
    return start, end


def _control(request: ImageRequest, version: RegisteredModel | None) -> bytes | None:
    """Return the file of a request's control image; None without one.

    Raises:
        APIError: 400, it is no base64, the version follows none or is mixed with adapters, or there is a
            scale without it, or one that the version does not take.
    """
    if request.control_image is None:
        if request.control_scale is not None:
            raise APIError(
                400, "control_scale: needs control_image, or leave it out", "control_scale", "invalid_value"
            )
        return None
    if version is None or not version.follows_control:
        reason = f"{label(version)} follows none; GET /v1/models says which models do (control)"
        raise APIError(400, f"control_image: {reason}", "control_image", "invalid_value")
    if version.control and request.control_scale not in (None, 1):
        reason = f"{label(version)} is an adapter, and follows control images in full; leave it out"
        raise APIError(400, f"control_scale: {reason}", "control_scale", "invalid_value")
    if version.control and request.adapters:
        reason = f"{label(version)} is an adapter itself, which is not mixed with others; leave them out"
        raise APIError(400, f"adapters: {reason}", "adapters", "invalid_value")
    try:
        return base64.b64decode(DATA_URL.sub("", request.control_image), validate=True)
    except binascii.Error:
        raise APIError(400, "control_image: must be base64", "control_image", "invalid_value") from None


def _too_many(images: Sequence[bytes], reason: str) -> APIError:
    return APIError(400, f"image: {len(images)} were sent, and {reason}", "image", "invalid_value")
