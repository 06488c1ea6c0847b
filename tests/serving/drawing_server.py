"""The engine behind POST /v1/images/generations, under a real HTTP server: enough to draw pictures again."""

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse

from serving.engine.thread import EngineThread
from serving.feedback.schemas import Generation, new_image_id
from serving.provenance import encode_png, facts_of
from serving.request import Request as DrawRequest
from serving.schemas import APIError
from tests.serving.feedback_server import application, key_id, served


def pixels_of(thread: EngineThread, generation: Generation) -> np.ndarray:
    """uint8, height x width x 3."""
    width, height = map(int, generation.size.split("x"))
    drawing = thread.submit(
        DrawRequest(
            generation.prompt,
            generation.seed,
            generation.steps,
            generation.guidance_scale,
            generation.negative_prompt,
            height,
            width,
        )
    ).result()
    return drawing.pixels.numpy()


@contextmanager
def drawing_server(thread: EngineThread, version: int = 3, provenance: bool = True) -> Iterator[str]:
    """It turns away every third request, as a limit would."""
    api, count = application(), iter(range(10**6))

    @api.post("/v1/images/generations")
    def generate(body: dict[str, Any], request: Request) -> JSONResponse:
        key_id(request)
        if next(count) % 3 == 0:
            error = APIError(429, "too many requests", code="rate_limit_exceeded")
            return JSONResponse(error.body(), 429, headers={"Retry-After": "0"})
        if body["steps"] > 100:
            raise APIError(400, "steps: at most 100", param="steps")
        assert body.pop("n") == 1
        known = {"image_id": new_image_id(), "created": time.time(), "version": version, "seconds": 1.0}
        body["model"], _, asked = body["model"].partition("@")
        assert asked
        generation = Generation.model_validate(known | body)
        facts = facts_of(generation.model_dump(), base="tiny") if provenance else None
        png = encode_png(pixels_of(thread, generation), facts)
        return JSONResponse({"data": [{"b64_json": base64.b64encode(png).decode()}]})

    with served(api) as url:
        yield url
