"""Draws the pictures of many requests, batched at every denoising step. Pure PyTorch: no Ray, no HTTP.

A request becomes a row. Rows join and leave between denoiser calls, each with its own prompt, seed, step
count, guidance, size, adapter and picture to begin with, and each is the picture that plain diffusers draws
of its request alone.
Rows are let in first come, first served, at most `max_rows` at a time; of those being drawn, the ones of one
size share a call, and the size whose row has waited longest for its step goes next.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ray_jobs.config.serve import Attention
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.sampling import initial_noise
from ray_jobs.diffusion.schedulers import trained_scheduler
from ray_jobs.diffusion.solvers import (
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
from serving.engine.scheduler import RequestQueue, next_group
from serving.engine.vae import Decoder, encode, next_chunk
from serving.load import Load


class Engine:
    """The synchronous core: `submit` from any thread, `step` from one.

    Args:
        pipeline: as `load_pipeline` or `optimizations.prepare` gives it; moved to `device`, unless it is
            offloaded.
        device: of PyTorch.
        max_rows: drawn at a time; a call of the denoiser has at most twice as many, with guidance.
        decode_rows: pictures that are encoded or decoded at a time: so long others' steps may have to wait.
        max_waiting: requests that may wait for a place; None: any number.
        max_side: pixels of a picture's longer side; None: twice that of the model's own.
        prompt_bytes: of the prompt embeddings that are kept, the least recently used is dropped first.
        adapter_folder: gives the local folder of an adapter's name, fetched and checked; it runs beside the
            loop. None: there are no adapters.
        adapter_bytes: of the adapters that are kept in memory.
        attention: the kernel of the denoiser's attention, `optimizations.attention_kernel`.
        cache_features: every other step of a row takes the deep features of the one before (`deepcache`):
            faster, and not quite the same pictures. For UNets.
        num_cores: of a CPU, that share the rows of a call; None: PyTorch's threads work on all rows together.

    Raises:
        ValueError: if the pipeline's scheduler is none of `solvers.SOLVERS`, or a switch of
            `optimizations.prepare` does not go with the other arguments.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        device: str = "cpu",
        max_rows: int = 8,
        decode_rows: int = 4,
        max_waiting: int | None = None,
        max_side: int | None = None,
        prompt_bytes: int = 256 << 20,
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
        self.max_rows, self.chunk_rows = max_rows, decode_rows
        self.denoiser = getattr(pipeline, self.family.denoiser)
        self.told = self.family.distilled_guidance(self.denoiser)
        self.clip, self.num_earlier = clip_range(pipeline.scheduler), num_earlier(pipeline.scheduler)
        self.deep = DeepCache(self.denoiser) if cache_features else None
        parts = self.family.adaptable(pipeline)
        self.low_rank = BatchedLoRA(parts)
        # One thread at a time may call what is compiled, keeps deep features, or fetches its weights.
        alone = compiled(pipeline) or offloaded(pipeline) or cache_features
        self.workers = CPUWorkers(num_cores, share_out=not alone)
        self.decoder = Decoder(pipeline.vae, chunk_rows=decode_rows, workers=self.workers)
        self.prompts = PromptEmbeddings(pipeline, self.low_rank, device=device, max_bytes=prompt_bytes)
        self.work = threading.Event()  # set when there may be something to do
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
        self._waiting = RequestQueue(self.adapters, read_ahead=max_rows, max_waiting=max_waiting)
        self._encoding: list[Row] = []
        self._running: list[Row] = []
        self._batches: dict[Kind, Batch] = {}
        self._calls = self._row_steps = self._first_steps = 0
        self.failed_calls = 0  # of the denoiser, since one succeeded
        self._seconds_to_first_step = 0.0

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width of the model's own pictures, pixels."""
        height, width = self.family.sample_size(self.pipeline)
        factor = self.pipeline.vae_scale_factor
        return height * factor, width * factor

    @property
    def unfinished(self) -> bool:
        """Whether any request is still to be answered."""
        return bool(len(self._waiting) or self._encoding or self._running or len(self.decoder))

    @property
    def _free(self) -> int:
        """Places that no row has."""
        return self.max_rows - len(self._encoding) - len(self._running)

    def load(self) -> Load:
        """For metrics; may be called from any thread."""
        kept = self.adapters
        return Load(
            places=self.max_rows,
            waiting=len(self._waiting),
            encoding=len(self._encoding),
            running=len(self._running),
            decoding=len(self.decoder),
            rejected=self._waiting.rejected,
            calls=self._calls,
            row_steps=self._row_steps,
            pictures=self.decoder.pictures,
            first_steps=self._first_steps,
            seconds_to_first_step=self._seconds_to_first_step,
            prompt_hits=self.prompts.hits,
            prompt_misses=self.prompts.misses,
            adapter_hits=kept.hits if kept else 0,
            adapter_misses=kept.misses if kept else 0,
            adapter_bytes=kept.num_bytes if kept else 0,
        )

    def check_steps(self, num_steps: int) -> None:
        """Raise ValueError if the scheduler cannot denoise in so many steps (some need a few at least)."""
        if num_steps < 1:
            raise ValueError(f"{num_steps}; at least one is needed")
        self._schedule(num_steps, *self.own_size)

    def submit(self, request: Request, on_preview: OnPreview | None = None) -> Future[Drawing]:
        """Put a request into the queue. To cancel it, cancel the future: its row leaves before the next step.

        Args:
            on_preview: called from the thread that steps, with the steps done and the picture as it is
                predicted then. Needed with `request.previews`.

        Raises:
            ValueError: naming the field that this model cannot do.
            QueueFull: as many requests wait as may.
        """
        height, width = self.own_size
        size = (request.height or height, request.width or width)
        with_adapters = self.adapters is not None
        check_request(request, size, self.pipeline, with_adapters=with_adapters, max_side=self.max_side)
        if bool(request.previews) != (on_preview is not None):
            raise ValueError(f"previews: {request.previews}; they and on_preview go together")
        strength = None if request.image is None else request.strength
        schedule = self._schedule(request.steps, *size, strength, request.zero_terminal_snr)
        row = Row(request, schedule, size, next(self._arrivals), on_preview)
        self._waiting.add(row, free=self._free)
        self.work.set()
        return row.future

    def step(self) -> bool:
        """Let rows in, encode one chunk, make one denoiser call, decode one chunk; whether there was anything
        to do.

        What goes wrong with a batch becomes the error of its requests.
        """
        with torch.inference_mode():
            self._drop_answered()
            joined = self._admit()
            self._encode_chunk()
            # Finished pictures take memory too: while as many wait as may run, no more are made.
            group = next_group(self._running) if len(self.decoder) < self.max_rows else []
            if group:
                self._guarded(group, lambda: self._denoise(group))
            chunk = self.decoder.next_chunk()
            if chunk:
                self._guarded([each.row for each in chunk], lambda: self.decoder.decode(chunk))
        return bool(joined or group or chunk)

    def drain(self) -> None:
        """Step until every request is answered."""
        while self.unfinished:
            self.work.clear()
            if not self.step() and self.unfinished:
                self.work.wait()  # for an adapter

    def fail_all(self, error: Exception) -> None:
        """Answer every request with an error."""
        for row in (*self._waiting.rows, *self._encoding, *self._running, *self.decoder.rows):
            row.fail(error)
        self._drop_answered()

    def close(self) -> None:
        """Stop reading adapters, and end the threads of the cores."""
        self.workers.close()
        if self.adapters is not None:
            self.adapters.close()

    def _tabulate(
        self,
        num_steps: int,
        height: int,
        width: int,
        strength: float | None = None,
        zero_terminal_snr: bool = False,
    ) -> Schedule:
        factor, scheduler = self.pipeline.vae_scale_factor, self.pipeline.scheduler
        shape = (height // factor, width // factor)
        if zero_terminal_snr:  # which changes neither `clip` nor that some steps take earlier outputs
            scheduler = trained_scheduler(scheduler)
        return tabulate(scheduler, self.family, num_steps, shape, strength)

    def _drop_answered(self) -> None:
        """Forget the rows that were cancelled or have failed, and batches of sizes that nobody draws."""
        self._waiting.drop_answered()
        self._encoding = [row for row in self._encoding if not row.future.done()]
        self._running = [row for row in self._running if not row.future.done()]
        self.decoder.drop_answered()
        sizes = {row.size for row in self._running}
        self._batches = {kind: batch for kind, batch in self._batches.items() if kind[0] in sizes}

    def _guarded(self, rows: Sequence[Row], work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a model may raise is the answer to these requests only
            for row in rows:
                row.fail(error)
            self._drop_answered()

    def _admit(self) -> list[Row]:
        """Give free places to the requests whose turn it is."""
        joined = self._waiting.take(self._free)
        if joined:
            self._encoding += [row for row in joined if row.request.image is not None]
            self._running += [row for row in joined if row.request.image is None]
            self._guarded(joined, lambda: self._begin(joined))
        return joined

    def _encode_chunk(self) -> None:
        """Let rows run that begin with a picture."""
        if not self._encoding:
            return
        chunk = next_chunk(self._encoding, self.chunk_rows)
        self._encoding = [row for row in self._encoding if row not in chunk]
        self._running += chunk
        for row in chunk:
            row.last_call = self._calls
        encoding = partial(encode, self.pipeline.vae, chunk, self.device)
        self._guarded(chunk, lambda: self.workers.together(encoding))

    def _begin(self, rows: list[Row]) -> None:
        """Embeddings and noise of rows that join."""
        guided = [row for row in rows if row.request.guidance_scale > 1 and not self.told]
        texts: list[Text] = [(row.request.prompt, row.adapter) for row in rows]
        texts += [(row.request.negative_prompt, row.adapter) for row in guided]
        embeds = self.workers.together(partial(self.prompts.embed, texts))
        for row, captions in zip(guided, embeds[len(rows) :], strict=True):
            row.null_captions = captions
        factor, channels = self.pipeline.vae_scale_factor, self.pipeline.vae.config.latent_channels
        for row, captions in zip(rows, embeds[: len(rows)], strict=True):
            height, width = row.size
            noise = initial_noise([row.request.seed], (channels, height // factor, width // factor))[0]
            row.latents = (noise * row.schedule.noise_scale).to(self.device)
            row.clean = torch.zeros_like(row.latents)
            if self.num_earlier:
                row.earlier = row.latents.new_zeros((self.num_earlier, *row.latents.shape))
            row.captions, row.last_call = captions, self._calls

    def _denoise(self, rows: list[Row]) -> None:
        """One step of rows of one kind."""
        kind, now = rows[0].kind, time.monotonic()
        if kind not in self._batches or self._batches[kind].rows != rows:
            self._batches[kind] = Batch.of(rows, self.family, self.denoiser, self.low_rank, self.device)
        batch = self._batches[kind]
        for row in rows:
            if not row.done:
                row.waited_s = now - row.submitted
                self._first_steps += 1
                self._seconds_to_first_step += row.waited_s
        step = coefficients([(row.schedule, row.done) for row in rows], self.device)
        latents = torch.stack([row.latents for row in rows])
        clean = torch.stack([row.clean for row in rows])
        self.failed_calls += 1
        output = self._predict(
            batch, batch.twice(latents * step.input_scale), batch.twice(step.timestep.flatten())
        )
        self.failed_calls = 0
        earlier = torch.stack([row.earlier for row in rows]) if self.num_earlier else None
        guided = batch.guide(output.float())
        latents, clean, earlier = advance(step, latents, guided, clean, self.clip, earlier)
        self._calls += 1
        self._row_steps += len(rows)
        for i, row in enumerate(rows):
            row.latents, row.clean = latents[i], clean[i]
            if earlier is not None:
                row.earlier = earlier[i]
            row.done += 1
            row.last_call = self._calls
            if row.finished or row.shows_preview:
                self.decoder.add(row)
        self._running = [row for row in self._running if not row.finished]

    def _predict(self, batch: Batch, inputs: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The denoiser's output for N + G rows of one kind, whose deep features are kept for the next."""
        inputs = inputs.to(self.denoiser.dtype)
        work = partial(self.workers.apart, partial(self._pass, batch, inputs, timesteps), len(inputs))
        with attention_kernel(self.attention):  # of all threads
            if self.deep is None:
                return work()
            given = [row.deep for row in batch.rows if row.deep is not None]
            output = self.deep.call(Batch.join(given) if given else None, work)
        made = [None] * len(batch.rows) if given else batch.split(self.deep.made)
        for row, deep in zip(batch.rows, made, strict=True):
            row.deep = deep
        return output

    def _pass(self, batch: Batch, inputs: torch.Tensor, timesteps: torch.Tensor, part: slice) -> torch.Tensor:
        """The denoiser's output for a part of a batch's rows."""
        share = batch.share(part)
        with self.low_rank.applied(share.stacks):
            return self.family.denoise(
                self.denoiser, inputs[part], timesteps[part], share.captions, share.sizes, share.told
            )
