"""What `benchmarks.serving` measures without a server: the bare denoiser, and an engine on its own.

Both run in processes of their own, with the replica's number of threads.
"""

import os
import time
from itertools import islice
from statistics import median
from typing import Any

import httpx
import torch

from benchmarks.serving_engine import bare_rows_per_second
from benchmarks.serving_load import GUIDANCE_SCALE, lone, requests_of
from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.engine.rows import Drawing, Request
from serving.engine.thread import EngineThread
from serving.messages import BASE
from serving.provenance import encode_png

STEPS = 20  # of a lone request
REST_S = 0.05  # between turns: threads of the former wait for work with a busy core for a while


def bare_denoiser(model: str, batch_sizes: list[int], seconds: float) -> dict[int, float]:
    """Picture steps a second, with guidance, by batch size: medians of turns in so many seconds, two at
    least."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pipeline = load_pipeline(model)
    found: dict[int, list[float]] = {size: [] for size in batch_sizes}
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(found[batch_sizes[-1]]) < 2:
        for size, speeds in found.items():
            speeds.append(bare_rows_per_second(pipeline, size))
    return {size: median(speeds) for size, speeds in found.items()}


def lone_requests(url: str, model: str, pictures: int, count: int) -> dict[str, float]:
    """Milliseconds of a request to an idle server and of an engine's drawing the same, in turns; medians.

    Args:
        url: of our server.
        pictures: of a request.
        count: of turns, after one that warms up.
    """
    thread = EngineThread(Engine(load_pipeline(model), num_cores=len(os.sched_getaffinity(0))))
    thread.start()
    found: list[dict[str, float]] = []
    with httpx.Client(timeout=600, trust_env=False) as client:
        for body in islice(requests_of(seed=1, models=[BASE]), count + 1):
            time.sleep(REST_S)
            served, _ = lone(url, body | {"n": pictures, "steps": STEPS}, client)
            time.sleep(REST_S)
            drawings = draw(thread, body["prompt"], body["seed"], pictures)
            engine = max(drawing.total_s for drawing in drawings)
            began = time.perf_counter()
            for drawing in drawings:
                encode_png(drawing.pixels.numpy(), {"prompt": body["prompt"]})
            png = time.perf_counter() - began
            found.append({"request": served, "engine": engine, "png": png, "overhead": served - engine})
    thread.stop()
    return {f"{name}_ms": 1e3 * median(turn[name] for turn in found[1:]) for name in found[0]}


def draw(thread: EngineThread, prompt: str, seed: int, pictures: int) -> list[Drawing]:
    """What the server's engine is asked for a request."""
    futures = [thread.submit(Request(prompt, seed + i, STEPS, GUIDANCE_SCALE)) for i in range(pictures)]
    return [future.result() for future in futures]


def facts() -> dict[str, Any]:
    """Of the machine and what runs on it."""
    import diffusers
    import ray

    return {
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "ray": ray.__version__,
    }
