"""A replica: generates images with the base and its fine-tuned versions."""

import asyncio
import gc
import logging
import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ray import serve

from cluster.fetched import local_path
from cluster.gpus import take_share
from ray_jobs.config import EvaluateConfig, ServeConfig
from ray_jobs.registry.local_weights import local_weights
from ray_jobs.registry.models import RegisteredModel
from serving.messages import (
    BASE,
    FOLLOWING_BASE,
    Base,
    BaseTraits,
    Picture,
    Placement,
    ReplicaLoad,
    RoutedRequest,
    adapter_name,
    base_of,
    label,
    placement_of,
    refusal,
)
from serving.replica.engine_cache import EngineCache, NoRoom
from serving.replica.image_input import read_control, read_masked, read_picture, read_references
from serving.replica.postprocess import Postprocessor
from serving.request import Request, RequestError, alone
from serving.schemas import APIError

if TYPE_CHECKING:
    import torch

    from ray_jobs.diffusion.protocols import Pipeline
    from serving.engine.engine import Engine
    from serving.engine.rows import Drawing, OnPreview
    from serving.engine.thread import EngineThread

logger = logging.getLogger("ray.serve")

TOO_MANY_FAILURES = 5  # consecutive failed calls, of any requests: the device or the process is broken
PARAMS = {
    "height": "size",
    "width": "size",
    "references": "image",
    "masked": "mask",
    "control": "control_image",
}  # HTTP parameters by fields of Request with other names
KEPT_ENGINES = 3  # the base, and two fused or fully trained versions: a champion and its successor


@serve.deployment
class Model:
    """Serve the bare base, LoRA versions as its adapters, ControlNets, and fully trained versions.

    Args:
        evaluate: configuration of the networks that measure drift.
        base: the model that the LoRA versions were trained on, stored here as it was then.
        first: version to warm up; a fully trained one needs no base.
        newest: function that returns the version to warm up when a replica starts later; None: `first`.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: ServeConfig,
        evaluate: EvaluateConfig,
        base: Base,
        first: RegisteredModel,
        newest: Callable[[], RegisteredModel] | None = None,
    ) -> None:
        self.settings, self.base = settings, base
        if newest is not None:
            current = await asyncio.to_thread(newest)
            first = current if base_of(current) == base else first
        self._name = uuid.uuid4().hex
        self._postprocess = Postprocessor(settings, evaluate, base.model)
        self.device = "cuda" if settings.use_gpu else "cpu"
        if settings.use_gpu:
            take_share(settings.gpu_share)
        self._versions: dict[str, RegisteredModel] = {}  # by name of their engine or adapter
        self._fetched = ExitStack()  # holds the weights of the adapter that was read last
        self.engine_cache: EngineCache[EngineThread] = EngineCache(self._load, _stop, max_kept=KEPT_ENGINES)
        self._first = first
        self._decoding = (
            asyncio.Lock()
        )  # one request's files at a time: a client's file may decode to a huge one
        self._num_cores: int | None = None
        if not settings.use_gpu:
            import torch

            torch.set_num_threads(1)  # for this thread; the engines set their own
            self._num_cores = max(1, len(os.sched_getaffinity(0)) // settings.max_replicas)
        try:
            await self.warm_up(first, settings.fuse_champion)
        except APIError as error:
            # Not fatal: the champion may have changed by the time a replica starts; the ingress requests it.
            logger.warning("%s", error.message)

    async def traits(self) -> BaseTraits:
        """Return what the ingress needs to know; all versions loaded together have the same base."""
        for thread in self.engine_cache.engines.values():  # the first version may have failed to load
            return _traits_of(thread)
        async with self._engine(self._first, self.settings.fuse_champion) as (thread, _):
            return _traits_of(thread)

    async def load(self) -> ReplicaLoad:
        """Return the load of this replica's engines, and its drift scores."""
        engines = self.engine_cache.engines.items()
        loads = {name: each.engine.load() for name, each in engines}
        return ReplicaLoad(self._name, os.getpid(), loads, self._postprocess.drift())

    async def warm_up(self, version: RegisteredModel | None, fused: bool = False) -> None:
        """Load a version and generate one image in few steps, unless that was done and it is still loaded.

        Raises:
            APIError: the weights differ from the registered ones, or cannot be loaded.
        """
        if self._is_warm(placement := placement_of(version, fused=fused)):
            self.engine_cache.touch(placement.engine)  # so that others make room for a successor
            return
        async with self._engine(version, fused) as (thread, _):
            steps = next(each for each in range(1, 100) if _accepts(thread, each))
            for request in first_requests(thread.engine, steps, compiled=self.settings.compile):
                await self._drawing(RoutedRequest(version, request, fused=fused))

    def _is_warm(self, placement: Placement) -> bool:
        """Return True if this engine has drawn, and it and its adapter, if any, are in memory."""
        thread = self.engine_cache.engines.get(placement.engine)
        if thread is None or not thread.engine.decoder.pictures:
            return False
        if placement.adapter is None:
            return True
        adapters = thread.engine.adapters
        return adapters is not None and adapters.holds(alone(placement.adapter))

    def check_health(self) -> None:
        """Raise RuntimeError if a GPU broke or an engine always fails; Serve then replaces the replica."""
        for name, thread in self.engine_cache.engines.items():
            if thread.engine.broken:
                raise RuntimeError(f"{name}: the GPU can no longer be used in this process")
            if (failed := thread.engine.failures) >= TOO_MANY_FAILURES:
                raise RuntimeError(f"{name}: {failed} calls in a row failed, and no image was drawn")

    async def draw(self, routed: RoutedRequest) -> Picture:
        """Generate one image, batched with other requests. A client that disconnects cancels it.

        Raises:
            APIError: the model does not support a parameter, which is named; 400 if the safety checker blocks
                the image.
        """
        drawing = await self._drawing(routed)
        return await self._picture(drawing, routed)

    async def _picture(self, drawing: "Drawing", routed: RoutedRequest) -> Picture:
        file = await asyncio.to_thread(self._postprocess.picture, drawing.pixels.numpy(), routed)
        return Picture(file, _size_of(drawing.pixels), drawing.waited_s)

    async def _drawing(self, routed: RoutedRequest) -> "Drawing":
        async with self._engine(routed.version, routed.fused) as (thread, adapter):
            return await self._finished(thread, await self._completed(routed, thread, adapter))

    async def _finished(
        self, thread: "EngineThread", request: Request, on_preview: "OnPreview | None" = None
    ) -> "Drawing":
        """Draw a completed request; where memory is too small, once more without the idle engines."""
        import torch

        closed = self.engine_cache.num_closed
        try:
            return await asyncio.wrap_future(_submit(thread, request, on_preview))
        except torch.OutOfMemoryError:
            # Another request of the same batch may have closed them.
            if not self.engine_cache.idle and self.engine_cache.num_closed == closed:
                raise
        await self.engine_cache.close_idle()
        return await asyncio.wrap_future(_submit(thread, request, on_preview))

    async def watch(self, routed: RoutedRequest) -> AsyncGenerator[Picture]:
        """Yield previews and then the finished image, see `draw`. Previews that the safety checker blocks are
        left out."""
        loop = asyncio.get_running_loop()
        seen: asyncio.Queue[torch.Tensor | None] = asyncio.Queue()  # pixels of previews; None at the end
        async with self._engine(routed.version, routed.fused) as (thread, adapter):
            request = await self._completed(routed, thread, adapter)
            shown: set[int] = set()  # a request that is drawn once more shows each preview once

            def show(num_steps: int, pixels: "torch.Tensor") -> None:
                if num_steps not in shown:
                    shown.add(num_steps)
                    loop.call_soon_threadsafe(seen.put_nowait, pixels)

            work = self._finished(thread, request, show if request.previews else None)
            drawing = asyncio.ensure_future(work)
            drawing.add_done_callback(lambda _: seen.put_nowait(None))
            try:
                while (pixels := await seen.get()) is not None:
                    show_as = partial(self._postprocess.preview, pixels.numpy(), routed.output)
                    preview = await asyncio.to_thread(show_as)
                    if preview is not None:
                        yield Picture(preview, _size_of(pixels))
                yield await self._picture(drawing.result(), routed)
            finally:
                drawing.cancel()

    async def _completed(self, routed: RoutedRequest, thread: "EngineThread", adapter: str | None) -> Request:
        """Return the request as the engine takes it: with its adapter and the pixels of its images."""
        request = routed.request
        if routed.image is not None or routed.references or routed.control is not None:
            async with self._decoding:
                request = await asyncio.to_thread(_with_pixels, routed, thread)
        for each in routed.adapters:
            self._versions[adapter_name(each)] = each
        versions = (*filter(None, [routed.version]), *routed.adapters)
        zero_terminal_snr = any(each.zero_terminal_snr for each in versions)
        return replace(request, adapter=adapter, zero_terminal_snr=zero_terminal_snr)

    @asynccontextmanager
    async def _engine(
        self, version: RegisteredModel | None, fused: bool
    ) -> "AsyncIterator[tuple[EngineThread, str | None]]":
        """Provide the engine that serves a version, and the name of its adapter there, if it is one."""
        placement = placement_of(version, fused=fused)
        if placement.adapter and self.settings.compile:
            message = (
                f"{label(version)} is a LoRA version, which a server with serve.compile serves "
                "only as its champion, with serve.fuse_champion"
            )
            raise APIError(503, message, "model", "model_refused")
        if version is not None:
            self._versions[placement.adapter or placement.engine] = version
        try:
            async with self.engine_cache.use(placement.engine) as thread:
                yield thread, placement.adapter
        except (ValueError, OSError, NoRoom) as error:
            raise self._cannot_serve(version, error) from error

    def _cannot_serve(self, version: RegisteredModel | None, error: Exception) -> APIError:
        """Return the error (503) for a version that cannot be loaded; log it with the places of its files."""
        logger.warning("%s cannot be served: %s", label(version), error)
        return APIError(503, refusal(version, self.base, error), "model", "model_refused")

    def _load(self, name: str, make_room: Callable[[], None]) -> "EngineThread":
        """Load and start the engine of this name; blocks its thread for seconds to minutes.

        Args:
            make_room: closes idle engines; called once the weights are known to be those registered.

        Raises:
            NoRoom: the device's memory is too small; what was loaded is freed.
        """
        import torch

        try:
            return self._loaded(name, make_room)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". ")[0]
        # Outside of the handler: the error holds on to the weights.
        _free_memory()
        raise NoRoom(f"its weights do not fit the device's memory beside what is in use: {reason}")

    def _loaded(self, name: str, make_room: Callable[[], None]) -> "EngineThread":
        import torch

        from ray_jobs.diffusion.families import family_of
        from ray_jobs.diffusion.precision import PRECISIONS
        from ray_jobs.weights.loading import load_pipeline
        from serving.engine.adapters import read_adapter
        from serving.engine.engine import Engine
        from serving.engine.optimizations import prepare
        from serving.engine.thread import EngineThread

        settings, fuse = self.settings, None
        version = self._versions.get(name)
        with (
            local_weights(version) if version else nullcontext() as folder
        ):  # the weights are verified before the base is loaded
            make_room()
            method = version.method if version else "lora"
            pipeline = load_pipeline(
                self.base.model if method == "full" else local_path(self.base.model),
                None if method == "lora" else folder,
                revision=self.base.revision,
                dtype=PRECISIONS[settings.precision],
                quantization=self.base.quantization,
                text_quantization=self.base.text_quantization,
            )
            if name == FOLLOWING_BASE or (version and version.control):
                _add_control_channels(pipeline)
            if folder and method == "lora":
                parts = family_of(pipeline).adaptable(pipeline)
                fuse = read_adapter(name, folder, parts, dtype=torch.float32)
        adapted = name in (BASE, FOLLOWING_BASE) or method == "controlnet"
        takes_adapters = adapted and not settings.compile
        try:
            prepare(
                pipeline,
                self.device,
                channels_last=settings.channels_last,
                compile=settings.compile,
                int8_weights=settings.int8_weights,
                offload=settings.offload,
                solver=settings.solver,
                fuse=fuse,
            )
            engine = Engine(
                pipeline,
                device=self.device,
                max_rows=settings.max_batch_size,
                max_waiting=settings.max_queued_requests * settings.max_pictures,
                max_side=settings.max_side,
                adapter_folder=self._adapter_folder if takes_adapters else None,
                adapter_bytes=settings.adapter_mb << 20,
                prompt_bytes=settings.prompt_mb << 20,
                reserve_prompts=True,
                attention=settings.attention,
                cache_features=settings.cache_features,
                num_cores=self._num_cores,
            )
        except ValueError as error:
            raise ValueError(f"serve.{error}") from error
        thread = EngineThread(engine)
        thread.start()
        return thread

    def _adapter_folder(self, name: str) -> Path:
        """Return the local folder of an adapter. A single thread reads adapters, one after the other, so the
        files of the previous one can be deleted."""
        self._fetched.close()
        return self._fetched.enter_context(local_weights(self._versions[name]))


def _add_control_channels(pipeline: "Pipeline") -> None:
    """Give a base the input channels that adapters for control images bring.

    Raises:
        ValueError: adapters of its family bring none.
    """
    from ray_jobs.diffusion.families import family_of

    family = family_of(pipeline)
    if family.control_channels is None:
        raise ValueError(f"adapters of {family.pipeline_class} follow no control images")
    family.control_channels.add_to(getattr(pipeline, family.denoiser))


def first_requests(engine: "Engine", num_steps: int, *, compiled: bool) -> list[Request]:
    """Return requests that make an engine ready: one, or one of each kind for which torch.compile compiles.

    It specializes on one row and on several (with guidance there are two), and on no reference, one and
    several.
    """
    import torch

    plain = Request("", 0, num_steps, 1.0)
    if not compiled:
        return [plain]
    side = 4 * engine.size_multiple
    blank = torch.zeros((side, side, 3), dtype=torch.uint8)
    counts = range(min(engine.family.max_references, 2) + 1)
    scales = (1.0, 2.0) if engine.family.has_guidance(engine.pipeline.config) else (1.0,)
    return [
        replace(plain, guidance_scale=scale, references=count * (blank,))
        for count in counts
        for scale in scales
    ]


def _with_pixels(routed: RoutedRequest, thread: "EngineThread") -> Request:
    """Decode a request's files; without a size it gets that of its first reference, or its control image.

    Raises:
        APIError: 400, one cannot be read.
    """
    request, engine = routed.request, thread.engine
    if routed.mask is not None:
        picture = routed.references[0] if routed.image is None else routed.image
        masked = read_masked(
            picture, routed.mask, _asked_size(request), engine.size_multiple, engine.max_side
        )
        height, width = masked.shape[:2]
        image = None if routed.image is None else masked[..., :3]
        request = replace(request, masked=masked, image=image, height=height, width=width)
        if engine.family.paints_masks:
            return request
    if routed.references:
        trained = routed.version.reference_resolution if routed.version else None
        pictures, size = read_references(routed.references, engine.size_multiple, engine.max_side, trained)
        height, width = request.height or size[0], request.width or size[1]
        request = replace(request, references=pictures, height=height, width=width)
    if routed.control is not None:
        wanted = _asked_size(request) or (engine.own_size if routed.image is not None else None)
        control = read_control(routed.control, wanted, engine.size_multiple, engine.max_side)
        height, width = control.shape[:2]
        request = replace(request, control=control, height=height, width=width)
    if routed.image is not None and routed.mask is None:
        height, width = engine.own_size
        image = read_picture(routed.image, request.height or height, request.width or width)
        request = replace(request, image=image)
    return request


def _asked_size(request: Request) -> tuple[int, int] | None:
    """Return a request's height and width; None if it has none."""
    return (request.height, request.width) if request.height and request.width else None


def _submit(
    thread: "EngineThread", request: Request, on_preview: "OnPreview | None" = None
) -> "Future[Drawing]":
    """Submit a request to the engine.

    Raises:
        APIError: 400 if the model does not support the request, 503 if the queue is full.
    """
    from serving.engine.scheduler import QueueFull

    try:
        return thread.submit(request, on_preview)
    except QueueFull as error:
        raise APIError(503, str(error), code="queue_full") from error
    except RequestError as error:
        param = PARAMS.get(error.field, error.field)
        raise APIError(400, f"{param}: {error.reason}", param, "invalid_value") from error


def _size_of(pixels: "torch.Tensor") -> str:
    height, width = pixels.shape[:2]
    return f"{width}x{height}"


def _traits_of(thread: "EngineThread") -> BaseTraits:
    engine = thread.engine
    family = engine.family
    return BaseTraits(*engine.own_size, family.max_references, family.paints_masks)


def _accepts(thread: "EngineThread", num_steps: int) -> bool:
    try:
        thread.engine.check_steps(num_steps)
    except ValueError:
        return False
    return True


def _stop(thread: "EngineThread") -> None:
    thread.stop()
    del thread
    _free_memory()


def _free_memory() -> None:
    import torch

    gc.collect()  # an engine has reference cycles, and the next one needs its memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.accelerator.empty_host_cache()  # pinned for `offload`
