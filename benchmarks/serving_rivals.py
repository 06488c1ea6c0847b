"""The rivals of `benchmarks.serving`: diffusers' own pipeline behind HTTP, in the two usual ways.

    python -m benchmarks.serving_rivals --model models/emoji-base --port 8001   # ends with its standard input

sequential: behind FastAPI, a request at a time, its `n` pictures in one call.
batched: a Ray Serve deployment with `@serve.batch`. A pipeline takes one step count and one guidance scale a
    call, so the pictures of a batch are drawn in groups of equal ones.
"""

import argparse
import asyncio
import base64
import io
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import uvicorn
from diffusers import StableDiffusionPipeline
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from starlette.requests import Request

BATCH_WAIT_S = 0.05  # for a batch to fill up: little beside the half second and more that one is drawn


class ImageRequest(BaseModel):
    """As much of the Images API as the load asks for."""

    prompt: str
    n: int
    steps: int
    seed: int
    guidance_scale: float


class Job(NamedTuple):
    """One picture."""

    prompt: str
    seed: int
    steps: int
    guidance_scale: float


class Painter:
    """diffusers' pipeline on all cores.

    Args:
        model: folder in diffusers' format.
    """

    def __init__(self, model: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.pipeline = StableDiffusionPipeline.from_pretrained(
            model, dtype=torch.float32, safety_checker=None
        )
        self.pipeline.set_progress_bar_config(disable=True)

    def draw(self, jobs: Sequence[Job]) -> list[bytes]:
        """PNG files of pictures of one step count and one guidance scale."""
        pictures = self.pipeline(
            [job.prompt for job in jobs],
            num_inference_steps=jobs[0].steps,
            guidance_scale=jobs[0].guidance_scale,
            generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
        ).images
        return [_as_png(picture) for picture in pictures]

    def draw_in_groups(self, jobs: Sequence[Job]) -> list[bytes]:
        """PNG files of any pictures: a call for each step count and guidance scale that there is."""
        drawn: dict[int, bytes] = {}
        groups: dict[tuple[int, float], list[int]] = {}
        for place, job in enumerate(jobs):
            groups.setdefault((job.steps, job.guidance_scale), []).append(place)
        for places in groups.values():
            drawn.update(zip(places, self.draw([jobs[place] for place in places]), strict=True))
        return [drawn[place] for place in range(len(jobs))]


def _as_png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _jobs(request: ImageRequest) -> list[Job]:
    """One a picture; the i-th has seed + i."""
    return [
        Job(request.prompt, request.seed + i, request.steps, request.guidance_scale) for i in range(request.n)
    ]


def _answer(pictures: Sequence[bytes]) -> dict[str, Any]:
    return {"data": [{"b64_json": base64.b64encode(png).decode()} for png in pictures]}


def sequential(model: str) -> FastAPI:
    """The application; requests are drawn in the order of their arrival."""
    api, painter, turn = FastAPI(), Painter(model), asyncio.Lock()

    @api.post("/v1/images/generations")
    async def generate(request: ImageRequest) -> dict[str, Any]:
        async with turn:
            return _answer(await asyncio.to_thread(painter.draw, _jobs(request)))

    return api


@serve.deployment
class Batched:
    """Batches the pictures of all requests, in the order of their arrival.

    Args:
        max_batch_size: pictures.
    """

    def __init__(self, model: str, max_batch_size: int) -> None:
        self.painter = Painter(model)
        self.draw.set_max_batch_size(max_batch_size)

    @serve.batch(batch_wait_timeout_s=BATCH_WAIT_S)
    async def draw(self, jobs: list[Job]) -> list[bytes]:
        """PNG files. In a thread, so that requests arrive meanwhile."""
        return await asyncio.to_thread(self.painter.draw_in_groups, jobs)

    async def __call__(self, request: Request) -> dict[str, Any]:
        jobs = _jobs(ImageRequest.model_validate_json(await request.body()))
        return _answer(await asyncio.gather(*(self.draw(job) for job in jobs)))


def batched(model: str, max_batch_size: int) -> serve.Application:
    """The application of `Batched`, with room for as many requests as anybody may send."""
    deployment = Batched.options(  # type: ignore[attr-defined]
        max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 1}
    )
    application: serve.Application = deployment.bind(model, max_batch_size)
    return application


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving_rivals", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    settings = uvicorn.Config(
        sequential(arguments.model), host="127.0.0.1", port=arguments.port, access_log=False
    )
    server = uvicorn.Server(settings)

    def end_with_parent() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=end_with_parent, daemon=True).start()
    server.run()


if __name__ == "__main__":
    main()
