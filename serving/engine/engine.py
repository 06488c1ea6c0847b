"""Generate the images of many requests, batched at every denoising step. Pure PyTorch: no Ray, no HTTP.

A request becomes a row. Rows join and leave between denoiser calls, each with its own prompt, seed, step
count, guidance, size, adapter, initial image, mask and reference pictures. Each yields the image that plain
diffusers generates for its request alone.
Rows are admitted first come, first served, at most `max_rows` at a time, and together at most as many pixels
as as many images of the model's own size have. Running rows whose sizes and references' sizes are the same
share a denoiser call, and those of which one has waited longest for its step go next. `scheduler` decides
this; the engine computes what it decides.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial
from itertools import count
from pathlib import Path

import torch

from ray_jobs.config.serve import Attention
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.families.family import NEXT_TIMESTEP
from ray_jobs.diffusion.memory import Chunks, device_broken
from ray_jobs.diffusion.precision import dtype_of
from ray_jobs.diffusion.protocols import Denoiser, Pipeline
from ray_jobs.diffusion.sampling import digest, first_noise, seeded
from ray_jobs.diffusion.schedulers import trained_scheduler
from ray_jobs.diffusion.solvers import (
    NoStepsLeft,
    Schedule,
    advance,
    check_scheduler,
    clip_range,
    coefficients,
    num_earlier,
    tabulate,
)
from serving.engine.adapters import AdapterCache, read_adapter
from serving.engine.batch import Batch
from serving.engine.batched_lora import BatchedLoRA
from serving.engine.cpu_workers import CPUWorkers
from serving.engine.deepcache import DeepCache
from serving.engine.optimizations import attention_kernel, check_switches, compiled, offloaded
from serving.engine.prompts import PromptEmbeddings, Text
from serving.engine.rows import Drawing, Kind, OnPreview, Request, Row, check_request
from serving.engine.scheduler import Decoding, Encoding, Scheduler
from serving.engine.vae import Decoder, encode
from serving.load import EngineLoad
from serving.request import RequestError


class Engine:
    """The synchronous core: call `submit` from any thread, `step` from a single one.

    Args:
        pipeline: the pipeline from `load_pipeline` or `optimizations.prepare`; moved to `device`, unless it
            is offloaded.
        device: PyTorch device.
        max_rows: maximum rows running at a time, of the model's own size; of larger ones there are as many
            as have the same number of pixels, those of references included, at least one. With guidance a
            denoiser call has up to twice as many rows; without it, rows of twice the pixels count as one.
        decode_rows: maximum images per VAE call, fewer of large ones; bounds how long a VAE call delays
            denoising.
        max_waiting: maximum requests waiting for a slot; None: no limit.
        max_side: maximum length of an image's longer side in pixels; None: twice the model's own.
        prompt_bytes: size of the prompt embedding cache (least recently used dropped first).
        reserve_prompts: take the memory of that cache with the first prompt.
        adapter_folder: function from an adapter's name to its local folder, fetched and checked; called from
            another thread than the step loop. None: no adapters.
        adapter_bytes: size of the adapter cache in memory.
        attention: attention kernel of the denoiser, see `optimizations.attention_kernel`.
        cache_features: reuse the deep features of the previous step in every other step of a row
            (`deepcache`): faster, but the images differ slightly. UNets only.
        num_cores: CPU cores that share the rows of a call; None: PyTorch's threads work on all rows together.

    Raises:
        ValueError: the pipeline's scheduler is not in `solvers.SOLVERS`, or a switch of
            `optimizations.prepare` is incompatible with the other arguments.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        device: str = "cpu",
        max_rows: int = 8,
        decode_rows: int = 4,
        max_waiting: int | None = None,
        max_side: int | None = None,
        prompt_bytes: int = 256 << 20,
        reserve_prompts: bool = False,
        adapter_folder: Callable[[str], Path] | None = None,
        adapter_bytes: int = 1 << 30,
        attention: Attention = "auto",
        cache_features: bool = False,
        num_cores: int | None = None,
    ) -> None:
        check_scheduler(pipeline.scheduler)
        check_switches(pipeline, with_adapters=adapter_folder is not None, cache_features=cache_features)
        self.pipeline = pipeline if offloaded(pipeline) else pipeline.to(device)
        self.family, self.device, self.attention = family_of(pipeline), device, attention
        self.model = self.family.model(pipeline)
        self.denoiser: Denoiser = self.model[self.family.denoiser]
        self.guidance_embedded = self.family.guidance_embedded(self.denoiser)
        self.told_ends = self.family.takes_next_timestep(self.denoiser)
        self.clip, self.num_earlier = clip_range(pipeline.scheduler), num_earlier(pipeline.scheduler)
        self.deep = DeepCache(self.denoiser) if cache_features else None
        parts = self.family.adaptable(pipeline)
        self.low_rank = BatchedLoRA(parts)
        # Only one thread at a time may call a denoiser that is compiled, offloaded or caches deep features.
        alone = compiled(pipeline) or offloaded(pipeline) or cache_features
        self.workers = CPUWorkers(num_cores, share_out=not alone)
        self.decoder = Decoder(pipeline, workers=self.workers)
        self.prompts = PromptEmbeddings(
            pipeline, self.low_rank, device=device, max_bytes=prompt_bytes, reserve=reserve_prompts
        )
        self.work = threading.Event()  # set when there may be work
        self.adapters: AdapterCache | None = None
        if adapter_folder is not None:
            self.adapters = AdapterCache(
                lambda name: read_adapter(name, adapter_folder(name), parts, device),
                max_bytes=adapter_bytes,
                on_loaded=self.work.set,
            )
        self.max_side = 2 * max(self.own_size) if max_side is None else max_side
        self._schedule = lru_cache(1024)(self._tabulate)
        self._arrivals = count()
        height, width = self.own_size
        takes_guidance = self.family.has_guidance(pipeline.config) and not self.guidance_embedded
        self.scheduler = Scheduler(
            self.adapters,
            max_rows=max_rows,
            max_pixels=max_rows * height * width * (2 if takes_guidance else 1),
            chunk_rows=decode_rows,
            max_waiting=max_waiting,
        )
        self._batches: dict[Kind, Batch] = {}
        self.failures = 0  # calls of any component that failed since an image was last decoded
        self.broken = False  # the device can no longer be used in this process
        self._joining, self._encoding, self._decoding = Chunks(), Chunks(), Chunks()
        self._denoising: defaultdict[int, Chunks] = defaultdict(Chunks)  # by pixels of a row

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width of the model's default image, in pixels."""
        return self.family.native_size(self.pipeline)

    @property
    def size_multiple(self) -> int:
        """Pixels that the sides of images and references are multiples of."""
        return self.family.codec.size_multiple(self.pipeline.vae.config, self.denoiser.config)

    @property
    def unfinished(self) -> bool:
        """True while any request is unanswered."""
        return self.scheduler.unfinished

    def load(self) -> EngineLoad:
        """Return the current load, for metrics; may be called from any thread."""
        scheduler, adapters = self.scheduler, self.adapters
        return EngineLoad(
            places=scheduler.max_rows,
            waiting=len(scheduler.waiting),
            encoding=len(scheduler.encoding),
            running=len(scheduler.running),
            decoding=len(scheduler.decoding),
            rejected=scheduler.waiting.rejected,
            calls=scheduler.calls,
            row_steps=scheduler.row_steps,
            pictures=self.decoder.pictures,
            first_steps=scheduler.first_steps,
            seconds_to_first_step=scheduler.seconds_to_first_step,
            prompt_hits=self.prompts.hits,
            prompt_misses=self.prompts.misses,
            adapter_hits=adapters.hits if adapters else 0,
            adapter_misses=adapters.misses if adapters else 0,
            adapter_bytes=adapters.num_bytes if adapters else 0,
        )

    def check_steps(self, num_steps: int) -> None:
        """Raise RequestError if the scheduler cannot denoise in `num_steps` steps (some have a minimum)."""
        if num_steps < 1:
            raise RequestError("steps", f"{num_steps}; must be at least 1")
        self._schedule(num_steps, *self.own_size)

    def submit(self, request: Request, on_preview: OnPreview | None = None) -> Future[Drawing]:
        """Queue a request. To cancel it, cancel the future: its row leaves before the next step.

        Args:
            on_preview: callback with the number of steps done and the image predicted at that step; called
                from the stepping thread. Required with `request.previews`.

        Raises:
            RequestError: the model does not support a field.
            QueueFull: the queue is full.
        """
        height, width = self.own_size
        size = (request.height or height, request.width or width)
        with_adapters = self.adapters is not None
        check_request(request, size, self.pipeline, with_adapters=with_adapters, max_side=self.max_side)
        if bool(request.previews) != (on_preview is not None):
            raise RequestError(
                "previews", f"{request.previews}; on_preview is required with previews, and only then"
            )
        strength = None if request.image is None else request.strength
        blends = request.masked is not None and not self.family.paints_masks
        if blends and strength == 1 and not hasattr(self.pipeline.scheduler, "scale_noise"):
            strength = None  # from noise alone, as in diffusers' pipelines that are not of flow matching
        schedule = self._schedule(request.steps, *size, strength, request.zero_terminal_snr, blends)
        guided = request.guidance_scale > 1 and not self.guidance_embedded
        row = Row(request, schedule, size, next(self._arrivals), on_preview, guided)
        if self.family.paints_masks:
            whole = torch.zeros(1, dtype=torch.uint8).expand(*size, 4)
            row.masked = whole if request.masked is None else request.masked
        self.scheduler.add(row)
        self.work.set()
        return row.future

    def step(self) -> bool:
        """Admit rows, encode one chunk, make one denoiser call, decode one chunk. Return False if idle.

        An exception in a batch becomes the error of its requests.
        """
        with torch.inference_mode():
            self._drop_answered()
            if joined := self.scheduler.admit():
                self._guarded(joined, lambda: self._joining.run(joined, self._begin))
            if images := self.scheduler.next_to_encode():
                self._guarded([each.row for each in images], lambda: self._encoding.run(images, self._encode))
            if group := self.scheduler.next_to_denoise():
                chunks = self._denoising[group[0].kind.pixels]
                self._guarded(group, lambda: chunks.run(group, self._denoise))
            if chunk := self.scheduler.next_to_decode():
                self._guarded([each.row for each in chunk], lambda: self._decoding.run(chunk, self._decode))
        return bool(joined or images or group or chunk)

    def drain(self) -> None:
        """Step until every request is answered."""
        while self.unfinished:
            self.work.clear()
            if not self.step() and self.unfinished:
                self.work.wait()  # until an adapter has been read

    def fail_all(self, error: Exception) -> None:
        """Fail every request with this error."""
        for row in self.scheduler.rows:
            row.fail(error)
        self._drop_answered()

    def close(self) -> None:
        """Stop the threads that read adapters and compute on the CPU."""
        self.workers.close()
        if self.adapters is not None:
            self.adapters.close()

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latents of an image, C x ..., given its size in pixels."""
        return self.family.codec.shape(self.pipeline.vae.config, height, width)

    def _tabulate(
        self,
        num_steps: int,
        height: int,
        width: int,
        strength: float | None = None,
        zero_terminal_snr: bool = False,
        levels: bool = False,
    ) -> Schedule:
        scheduler = self.pipeline.scheduler
        if zero_terminal_snr:  # changes neither `clip` nor `num_earlier`
            scheduler = trained_scheduler(scheduler)
        try:
            shape = self.latent_shape(height, width)
            return tabulate(scheduler, self.family, num_steps, shape, strength, levels=levels)
        except NoStepsLeft as error:
            raise RequestError("strength", str(error)) from error
        except ValueError as error:
            raise RequestError("steps", str(error)) from error

    def _drop_answered(self) -> None:
        """Drop rows that were cancelled or have failed, and batches of kinds that no running row has."""
        self.scheduler.drop_answered()
        kinds = {row.kind[:2] for row in self.scheduler.running}  # with and without cached features
        self._batches = {kind: batch for kind, batch in self._batches.items() if kind[:2] in kinds}

    def _guarded(self, rows: Sequence[Row], work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # a model may raise anything; only these requests fail
            self.failures += 1
            self.broken = self.broken or device_broken(error)
            for row in rows:
                row.fail(error)
            self._drop_answered()

    def _begin(self, rows: list[Row]) -> None:
        """Set the prompt embeddings and initial noise of newly admitted rows."""
        guided = [row for row in rows if row.guided]
        text = self.family.text
        seen = {row: row.request.references if text.sees_references else () for row in rows}
        digests = {row: digest(pictures) if pictures else b"" for row, pictures in seen.items()}
        texts = [
            Text(text.as_prompt(row.request.prompt), row.adapter, seen[row], digests[row]) for row in rows
        ]
        for row in guided:
            negative = row.request.negative_prompt
            written = None if negative is None else text.as_negative(negative)
            texts.append(Text(written, row.adapter, seen[row], digests[row]))
        embeds = self.workers.together(partial(self.prompts.embed, texts))
        for row, captions in zip(guided, embeds[len(rows) :], strict=True):
            row.null_captions = captions
        for row, captions in zip(rows, embeds[: len(rows)], strict=True):
            shape, generators = self.latent_shape(*row.size), seeded([row.request.seed])
            noise = first_noise(self.family, generators, shape, is_controlled=row.is_controlled)[0]
            row.latents = (noise * row.schedule.noise_scale).to(self.device)
            row.clean = torch.zeros_like(row.latents)
            if self.num_earlier:
                row.earlier = row.latents.new_zeros((self.num_earlier, *row.latents.shape))
            row.captions = captions

    def _encode(self, chunk: list[Encoding]) -> None:
        self.workers.together(partial(encode, self.pipeline, chunk, self.device))

    def _decode(self, chunk: list[Decoding]) -> None:
        self.decoder.decode(chunk)
        self.failures = 0

    def _denoise(self, rows: list[Row]) -> None:
        """Make one denoising step for rows of one kind."""
        kind = rows[0].kind
        if kind not in self._batches or not self._batches[kind].suits(rows):
            self._batches[kind] = Batch.of(rows, self.family, self.model, self.low_rank, self.device)
        batch, before = self._batches[kind], [row.guides for row in rows]
        latents = torch.stack([row.latents for row in rows])
        step = coefficients([(row.schedule, row.done) for row in rows], self.device, latents.dim() - 1)
        clean = torch.stack([row.clean for row in rows])
        ends = step.next_timestep.flatten() if self.told_ends else None
        output = self._predict(
            batch,
            batch.twice(latents * step.input_scale),
            batch.twice(step.timestep.flatten()),
            None if ends is None else batch.twice(ends),
        )
        earlier = torch.stack([row.earlier for row in rows]) if self.num_earlier else None
        guided = batch.guide(output.float())
        latents, clean, earlier = advance(step, latents, guided, clean, self.clip, earlier)
        for i, row in enumerate(rows):
            row.latents, row.clean = latents[i], clean[i]
            if row.blend is not None:
                row.latents = row.blend.into(latents[i], row.schedule.levels[row.done])
            if earlier is not None:
                row.earlier = earlier[i]
        self.scheduler.stepped(rows)
        for row, was_guided in zip(rows, before, strict=True):
            if row.guides != was_guided:
                row.deep = None  # features of the other number of passes

    def _predict(
        self, batch: Batch, inputs: torch.Tensor, timesteps: torch.Tensor, ends: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the denoiser's output for N + G rows of one kind; keep deep features for the next step.

        Args:
            ends: timesteps at which the rows' steps end, for flow maps.
        """
        inputs = inputs.to(dtype_of(self.denoiser))
        work = partial(self.workers.apart, partial(self._pass, batch, inputs, timesteps, ends), len(inputs))
        with attention_kernel(self.attention):  # applies to all threads
            if self.deep is None:
                return work()
            given = [row.deep for row in batch.rows if row.deep is not None]
            output = self.deep.call(Batch.join(given) if given else None, work)
        made = [None] * len(batch.rows) if given else batch.split(self.deep.made)
        for row, deep in zip(batch.rows, made, strict=True):
            row.deep = deep
        return output

    def _pass(
        self,
        batch: Batch,
        inputs: torch.Tensor,
        timesteps: torch.Tensor,
        ends: torch.Tensor | None,
        part: slice,
    ) -> torch.Tensor:
        """Return the denoiser's output for a slice of a batch's rows."""
        share = batch.share(part)
        conditions = share.conditions if ends is None else share.conditions | {NEXT_TIMESTEP: ends[part]}
        with self.low_rank.applied(share.stacks):
            return self.family.denoise(self.model, inputs[part], timesteps[part], conditions)
