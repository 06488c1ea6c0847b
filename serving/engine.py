"""Draws the pictures of many requests, batched at every denoising step. Pure PyTorch: no Ray, no HTTP.

A request becomes a row. Rows join and leave between denoiser calls, each with its own prompt, seed, step
count, guidance, size and adapter, and each is the picture that plain diffusers draws of its request alone.
Rows are let in first come, first served, at most `max_rows` at a time; of those being drawn, the ones of one
size share a call, and the size whose row has waited longest for its step goes next.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.sampling import initial_noise
from serving.adapters import AdapterCache, read_adapter
from serving.decoding import Decoder
from serving.low_rank import GroupedLowRank
from serving.prompts import PromptEmbeddings, Text
from serving.rows import Batch, Drawing, OnPreview, Request, Row, check_request, next_group
from serving.solvers import Schedule, advance, check_scheduler, clip_range, coefficients, tabulate


class Load(NamedTuple):
    """What the engine is doing, and has done since it was made."""

    waiting: int  # requests that have no place yet
    running: int  # rows between their first step and their last
    decoding: int  # pictures and previews after that
    calls: int  # of the denoiser
    row_steps: int  # steps of all rows in these calls
    pictures: int  # finished
    prompt_hits: int
    prompt_misses: int
    adapter_hits: int
    adapter_misses: int
    adapter_bytes: int


class Engine:
    """The synchronous core: `submit` from any thread, `step` from one.

    Args:
        pipeline: as `load_pipeline` gives it; moved to `device`.
        device: of PyTorch.
        max_rows: drawn at a time; a call of the denoiser has at most twice as many, with guidance.
        decode_rows: pictures a chunk: so long a step may have to wait for others' pictures.
        cached_prompts: prompt embeddings that are kept, the least recently used is dropped first.
        adapter_folder: gives the local folder of an adapter's name, fetched and checked; it runs beside the
            loop. None: there are no adapters.
        adapter_bytes: of the adapters that are kept in memory.

    Raises:
        ValueError: if the pipeline's scheduler is none of `solvers.SOLVERS`.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        device: str = "cpu",
        max_rows: int = 8,
        decode_rows: int = 4,
        cached_prompts: int = 256,
        adapter_folder: Callable[[str], Path] | None = None,
        adapter_bytes: int = 1 << 30,
    ) -> None:
        check_scheduler(pipeline.scheduler)
        self.pipeline, self.family, self.device = pipeline.to(device), family_of(pipeline), device
        self.max_rows = max_rows
        self.denoiser = getattr(pipeline, self.family.denoiser)
        self.told = self.family.distilled_guidance(self.denoiser)
        self.clip = clip_range(pipeline.scheduler)
        parts = {self.family.denoiser: self.denoiser, **self.family.encoders(pipeline)}
        self.low_rank = GroupedLowRank(parts)
        self.decoder = Decoder(pipeline.vae, chunk_rows=decode_rows)
        self.prompts = PromptEmbeddings(pipeline, self.low_rank, max_prompts=cached_prompts)
        self.work = threading.Event()  # set when there may be something to do
        self.adapters: AdapterCache | None = None
        if adapter_folder is not None:
            self.adapters = AdapterCache(
                lambda name: read_adapter(name, adapter_folder(name), parts),
                max_bytes=adapter_bytes,
                on_loaded=self.work.set,
            )
        self._schedule = lru_cache(1024)(self._tabulate)
        self._arrivals = count()
        self._submitted: SimpleQueue[Row] = SimpleQueue()  # by other threads; the rest is the stepping one's
        self._waiting: list[Row] = []
        self._running: list[Row] = []
        self._batches: dict[tuple[int, int], Batch] = {}
        self._calls = self._row_steps = 0

    @property
    def resolution(self) -> int:
        """Pixels a side of the model's own pictures."""
        return int(self.family.sample_size(self.pipeline) * self.pipeline.vae_scale_factor)

    @property
    def unfinished(self) -> bool:
        """Whether any request is still to be answered."""
        return bool(self._submitted.qsize() or self._waiting or self._running or len(self.decoder))

    def load(self) -> Load:
        """For metrics; may be called from any thread."""
        kept = self.adapters
        return Load(
            waiting=self._submitted.qsize() + len(self._waiting),
            running=len(self._running),
            decoding=len(self.decoder),
            calls=self._calls,
            row_steps=self._row_steps,
            pictures=self.decoder.pictures,
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
        self._schedule(num_steps, self.resolution, self.resolution)

    def submit(self, request: Request, on_preview: OnPreview | None = None) -> Future[Drawing]:
        """Put a request into the queue. To cancel it, cancel the future: its row leaves before the next step.

        Args:
            on_preview: called from the thread that steps, with the steps done and the picture as it is
                predicted then. Needed with `request.previews`.

        Raises:
            ValueError: naming the field that this model cannot do.
        """
        size = (request.height or self.resolution, request.width or self.resolution)
        check_request(request, size, self.pipeline, with_adapters=self.adapters is not None)
        if bool(request.previews) != (on_preview is not None):
            raise ValueError(f"previews: {request.previews}; they and on_preview go together")
        schedule = self._schedule(request.steps, *size)
        row = Row(request, schedule, size, next(self._arrivals), on_preview)
        self._submitted.put(row)
        self.work.set()
        return row.future

    def step(self) -> bool:
        """Let rows in, make one denoiser call, decode one chunk; whether there was anything to do.

        What goes wrong with a batch becomes the error of its requests.
        """
        with torch.inference_mode():
            self._drop_answered()
            joined = self._admit()
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
        self._take_submitted()
        for row in (*self._waiting, *self._running, *self.decoder.rows):
            row.fail(error)
        self._drop_answered()

    def close(self) -> None:
        """Stop reading adapters."""
        if self.adapters is not None:
            self.adapters.close()

    def _tabulate(self, num_steps: int, height: int, width: int) -> Schedule:
        factor = self.pipeline.vae_scale_factor
        shape = (height // factor, width // factor)
        return tabulate(self.pipeline.scheduler, self.family, num_steps, shape)

    def _take_submitted(self) -> None:
        while self._submitted.qsize():  # this thread is the only one that takes
            self._waiting.append(self._submitted.get())

    def _drop_answered(self) -> None:
        """Forget the rows that were cancelled or have failed, and batches of sizes that nobody draws."""
        self._waiting = [row for row in self._waiting if not row.future.done()]
        self._running = [row for row in self._running if not row.future.done()]
        self.decoder.drop_answered()
        sizes = {row.size for row in self._running}
        self._batches = {size: batch for size, batch in self._batches.items() if size in sizes}

    def _guarded(self, rows: Sequence[Row], work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a model may raise is the answer to these requests only
            for row in rows:
                row.fail(error)
            self._drop_answered()

    def _admit(self) -> list[Row]:
        """Give free places to the requests that came first and whose adapters are in memory.

        Adapters are read ahead, for as many waiting requests as there are places. A request whose adapter is
        still being read is passed by others, and takes the first place that is free afterwards.
        """
        self._take_submitted()
        adapted = [row for row in self._waiting if row.request.adapter is not None]
        read_ahead = set(adapted[: self.max_rows])
        ready = [
            row
            for row in self._waiting
            if row.request.adapter is None or (row in read_ahead and self._has_adapter(row))
        ]
        joined = ready[: self.max_rows - len(self._running)]
        self._waiting = [row for row in self._waiting if row not in joined and not row.future.done()]
        if joined:
            self._running += joined
            self._guarded(joined, lambda: self._begin(joined))
        return joined

    def _has_adapter(self, row: Row) -> bool:
        """Whether the row's adapter is in memory; if not, it is read."""
        if row.adapter is not None:
            return True
        assert self.adapters is not None and row.request.adapter is not None
        try:
            row.adapter = self.adapters.get(row.request.adapter)
        except Exception as error:  # whatever reading it may raise is the answer to this request
            row.fail(error)
        return row.adapter is not None

    def _begin(self, rows: list[Row]) -> None:
        """Embeddings and noise of rows that join."""
        guided = [row for row in rows if row.request.guidance_scale > 1 and not self.told]
        texts: list[Text] = [(row.request.prompt, row.adapter) for row in rows]
        texts += [(row.request.negative_prompt, row.adapter) for row in guided]
        embeds = self.prompts.embed(texts)
        for row, captions in zip(guided, embeds[len(rows) :], strict=True):
            row.null_captions = captions
        factor, channels = self.pipeline.vae_scale_factor, self.pipeline.vae.config.latent_channels
        for row, captions in zip(rows, embeds[: len(rows)], strict=True):
            height, width = row.size
            noise = initial_noise([row.request.seed], (channels, height // factor, width // factor))[0]
            row.latents = (noise * row.schedule.noise_scale).to(self.device)
            row.clean = torch.zeros_like(row.latents)
            row.captions, row.last_call = captions, self._calls

    def _denoise(self, rows: list[Row]) -> None:
        """One step of rows of one size."""
        size, now = rows[0].size, time.monotonic()
        if size not in self._batches or self._batches[size].rows != rows:
            self._batches[size] = Batch.of(rows, self.family, self.told, self.low_rank, self.device)
        batch = self._batches[size]
        for row in rows:
            row.waited_s = row.waited_s or now - row.submitted
        step = coefficients([(row.schedule, row.done) for row in rows], self.device)
        latents = torch.stack([row.latents for row in rows])
        clean = torch.stack([row.clean for row in rows])
        with self.low_rank.applied(batch.stacks):
            output = self.family.denoise(
                self.denoiser,
                batch.twice(latents * step.input_scale).to(self.denoiser.dtype),
                batch.twice(step.timestep.flatten()),
                batch.captions,
                batch.sizes,
                batch.told,
            )
        latents, clean = advance(step, latents, batch.guide(output.float()), clean, self.clip)
        self._calls += 1
        self._row_steps += len(rows)
        for i, row in enumerate(rows):
            row.latents, row.clean = latents[i], clean[i]
            row.done += 1
            row.last_call = self._calls
            if row.finished or row.shows_preview:
                self.decoder.add(row)
        self._running = [row for row in self._running if not row.finished]
