"""The serving engine: pictures a second of requests that differ, and its steps beside the bare denoiser's."""

import math
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.measuring import (
    WORKING_DTYPE,
    Figures,
    device_name,
    free,
    kernels_of,
    peak_gib,
    seconds_a_call,
    waits_of,
)
from benchmarks.gpu.shapes import CAPTIONS, SHAPES, Shape
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.precision import cast
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.diffusion.sampling import encode_prompts, whole_pictures
from ray_jobs.weights.saving import write_adapter
from serving.engine.engine import Engine
from serving.engine.optimizations import prepare
from serving.engine.rows import Drawing
from serving.engine.thread import EngineThread
from serving.request import Request

MODELS = {"SD1.5": (0, 1, 4), "SDXL": (0, 4)}  # and with how many adapters
OPEN = "SD1.5"  # the model that an open loop asks too
REQUESTS, STEPS = {"small": 6, "full": 32}, {"small": 3, "full": 20}
ROWS = {"small": (1, 4), "full": (1, 2, 4, 8, 16)}
ADAPTERS = 4
RANK = 16
GUIDED, OF = 7, 10  # requests with guidance, and of how many
GUIDANCE_SCALE = 5.0
OPEN_LOAD = 0.8  # of the pictures a second of the closed loop
CALLS = {"small": 2, "full": 10}  # of the denoiser that are timed


def run(size: str) -> Iterator[tuple[str, Figures]]:
    for model, numbers in MODELS.items():
        free()
        with TemporaryDirectory() as folder:
            engine, adapters = engine_of(SHAPES[size][model], Path(folder), max_rows=max(ROWS[size]))
            speeds = []
            for number in numbers:
                figures = closed_loop(engine, size, adapters[:number])
                speeds.append(figures["pictures_per_second"])
                yield f"{model}, {number} adapters", figures
            yield f"{model}, a row joins", joining(engine, adapters, size)
            for rows in ROWS[size]:
                yield f"{model}, {rows} rows", beside_the_denoiser(engine, rows, size)
            yield f"{model}, memory", {"peak_gib": peak_gib()}
            if model == OPEN:
                yield f"{model}, open loop", open_loop(engine, requests_of(size), OPEN_LOAD * speeds[0])
            else:
                engine.close()
        del engine


def engine_of(shape: Shape, folder: Path, *, max_rows: int) -> tuple[Engine, list[str]]:
    """Return an engine as a replica on a GPU builds it, and the names of the adapters that it can read."""
    device = device_name()
    pipeline = shape.pipeline(device, WORKING_DTYPE)
    names = [write_random_adapter(pipeline, folder / f"adapter-{number}") for number in range(ADAPTERS)]
    prepare(pipeline, device, channels_last=shape.family.is_unet)
    return Engine(pipeline, device=device, max_rows=max_rows, adapter_folder=folder.joinpath), names


def write_random_adapter(pipeline: Any, folder: Path) -> str:
    """Write an adapter of the denoiser's attention layers as publish does; return its name."""
    family = family_of(pipeline)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in getattr(pipeline, family.denoiser).named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(family.trainable[family.denoiser]):
            down, up = (RANK, layer.in_features), (layer.out_features, RANK)
            tensors[f"{name}.lora_A.weight"] = 0.02 * torch.randn(down, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.02 * torch.randn(up, generator=generator)
    folder.mkdir()
    write_adapter(folder, {family.denoiser: tensors}, {family.denoiser: {"r": RANK, "lora_alpha": RANK}})
    return folder.name


def requests_of(size: str, adapters: Sequence[str] = ()) -> list[Request]:
    """Return requests of which most are guided; adapters take turns."""
    return [
        Request(
            CAPTIONS[seed % len(CAPTIONS)],
            seed,
            STEPS[size],
            GUIDANCE_SCALE if seed % OF < GUIDED else 1.0,
            adapter=adapters[seed % len(adapters)] if adapters else None,
        )
        for seed in range(REQUESTS[size])
    ]


def closed_loop(engine: Engine, size: str, adapters: Sequence[str] = ()) -> Figures:
    """Draw requests that all wait from the start, so that each row that leaves makes room for the next."""
    requests = requests_of(size, adapters)
    drawn(engine, requests[: max(len(adapters), 2)])  # reads adapters, encodes prompts, chooses kernels
    before, begin = engine.load(), time.perf_counter()
    drawings = drawn(engine, requests)
    seconds, after = time.perf_counter() - begin, engine.load()
    calls = after.calls - before.calls
    return {
        "pictures_per_second": len(requests) / seconds,
        "ms_a_call": 1e3 * seconds / calls,
        "occupancy": (after.row_steps - before.row_steps) / (calls * after.places),
        **seconds_to_answer(drawings),
    }


def drawn(engine: Engine, requests: Sequence[Request]) -> list[Drawing]:
    futures = [engine.submit(request) for request in requests]
    engine.drain()
    return [future.result() for future in futures]


def open_loop(engine: Engine, requests: Sequence[Request], rate: float) -> Figures:
    """Send so many requests a second, however long the answers take; closes the engine."""
    thread = EngineThread(engine)
    thread.start()
    begin, futures = time.perf_counter(), []
    for number, request in enumerate(requests):
        time.sleep(max(0.0, begin + number / rate - time.perf_counter()))
        futures.append(thread.submit(request))
    drawings = [future.result() for future in futures]
    thread.stop()
    return {"requests_per_second": rate, "requests": len(drawings), **seconds_to_answer(drawings)}


def seconds_to_answer(drawings: Sequence[Drawing]) -> Figures:
    seconds = sorted(drawing.total_s for drawing in drawings)
    return {f"p{share}_s": seconds[math.ceil(share / 100 * len(seconds)) - 1] for share in (50, 95)}


def joining(engine: Engine, adapters: Sequence[str], size: str) -> Figures:
    """Return what a step launches while rows with different adapters run, and the step in which one joins."""
    numbers = count()

    def add(adapter: str) -> None:
        engine.submit(Request(CAPTIONS[0], next(numbers), 10 * STEPS[size], 1.0, adapter=adapter))

    for adapter in adapters[:-1]:
        add(adapter)
    for _ in range(2):
        engine.step()
    waits, plain = waits_of(engine.step), kernels_of(engine.step)
    add(adapters[-1])
    joined = kernels_of(engine.step)
    clear(engine)
    if plain is None or joined is None:
        return {"waits": waits, "kernels_a_step": None, "kernels_more": None}
    return {"waits": waits, "kernels_a_step": plain[0], "kernels_more": joined[0] - plain[0]}


def beside_the_denoiser(engine: Engine, rows: int, size: str) -> Figures:
    """Return the seconds of an engine's step with so many rows, and those of the denoiser alone."""
    calls = CALLS[size]
    for seed in range(rows):
        engine.submit(Request(CAPTIONS[0], seed, 4 * calls, 1.0))
    step = seconds_a_call(engine.step, warm=2, calls=calls)
    clear(engine)
    bare = seconds_a_call(bare_denoiser(engine.pipeline, rows), warm=2, calls=calls)
    return {"ms_a_step": 1e3 * step, "ms_of_the_denoiser": 1e3 * bare, "share_of_bare": bare / step}


def clear(engine: Engine) -> None:
    """Cancel what runs."""
    for row in engine.scheduler.rows:
        row.future.cancel()
    engine.step()


def bare_denoiser(pipeline: Pipeline, rows: int) -> Any:
    """Return a function that calls the denoiser with inputs that lie on the device."""
    family, model = family_of(pipeline), family_of(pipeline).model(pipeline)
    dtype, device = model[family.denoiser].dtype, pipeline.device
    height, width = family.native_size(pipeline)
    conditions = encode_prompts(pipeline, [CAPTIONS[0]] * rows)
    conditions |= whole_pictures(family, rows, height, width, device)
    conditions = {name: cast(each, dtype) for name, each in conditions.items()}
    shape = family.codec.shape(pipeline.vae.config, height, width)
    latents = torch.zeros((rows, *shape), dtype=dtype, device=device)
    timesteps = torch.full((rows,), 500.0, device=device)

    @torch.inference_mode()
    def call() -> None:
        family.denoise(model, latents, timesteps, conditions)

    return call
