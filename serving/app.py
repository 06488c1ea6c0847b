"""The endpoint: the registry's champion behind OpenAI's Images API, on Ray Serve.

    python -m serving.command --config configs/demo.yaml            # stays up until Ctrl-C
    python -m serving.command --config configs/demo.yaml --ask 4    # draws four pictures and stops

A thin ingress checks requests and takes them apart into rows, one a picture; the engine in the model's
replicas batches the rows of all requests.
"""

import asyncio
import base64
import os
import random
import time
from dataclasses import replace
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from cluster.storage import Storage
from ray_jobs.config import Config, load_config, resolve_path
from ray_jobs.registry import RegisteredModel, champion, verify_weights
from serving.schemas import (
    MAX_SEED,
    APIError,
    ImageData,
    ImageRequest,
    ImageResponse,
    ModelCard,
    ModelList,
    invalid_request,
)

APPLICATION = "diffray"


class Row(NamedTuple):
    """One picture to draw."""

    prompt: str
    seed: int
    steps: int
    guidance_scale: float


@serve.deployment
class Model:
    """A replica: the champion in an engine, drawing the rows of all requests.

    Raises:
        ConfigError: if the weights are not those that were registered.
    """

    def __init__(self, config: Config, registered: RegisteredModel):
        import torch

        from ray_jobs.diffusion.loading import load_pipeline
        from serving.engine import Engine
        from serving.engine_thread import EngineThread

        # The weights that are checked are the ones that are loaded: a remote folder is fetched once.
        folder = Storage.open(registered.source).local_copy()
        verify_weights(registered, str(folder))
        if not config.serve.use_gpu:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // config.serve.replicas))
        pipeline = load_pipeline(registered.base, folder, revision=registered.base_revision)
        device = "cuda" if config.serve.use_gpu else "cpu"
        self.engine = Engine(pipeline, device=device, max_rows=config.serve.max_batch_size)
        self.card = ModelCard(
            id=registered.name,
            created=int(time.time()),
            version=registered.version,
            size=f"{self.engine.resolution}x{self.engine.resolution}",
        )
        self.thread = EngineThread(self.engine)
        self.thread.start()

    async def describe(self) -> ModelCard:
        """What is served."""
        return self.card

    async def draw(self, row: Row) -> bytes:
        """Draw one row as a PNG, beside the rows of other requests. A client that goes away cancels it.

        Raises:
            APIError: 400 for a step count that the scheduler refuses.
        """
        from serving.rows import Request as DrawRequest

        try:
            self.engine.check_steps(row.steps)
        except ValueError as error:
            raise APIError(400, f"steps: {error}", "steps", "invalid_value") from error
        request = DrawRequest(row.prompt, row.seed, row.steps, row.guidance_scale)
        drawing = await asyncio.wrap_future(self.thread.submit(request))
        return await asyncio.to_thread(_png, drawing.pixels.numpy())


def _png(pixels: Any) -> bytes:
    """A PNG file of uint8, height x width x 3."""
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


api = FastAPI(title="diffray", summary="Text-to-image in the shape of OpenAI's Images API")


@api.exception_handler(APIError)
async def _answer_error(_: Request, error: APIError) -> JSONResponse:
    return JSONResponse(error.body(), error.status)


@api.exception_handler(RequestValidationError)
async def _answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    return await _answer_error(request, invalid_request(error.errors()[0]))


@api.exception_handler(HTTPException)
async def _answer_http(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _answer_error(request, APIError(error.status_code, message))


@serve.deployment
@serve.ingress(api)
class Ingress:
    """Checks requests, limits how many are open, and hands their rows to the model."""

    def __init__(self, config: Config, model: DeploymentHandle):
        self.limits = config.serve
        self.model = model
        self.card: ModelCard | None = None
        self.num_open = 0

    async def _card(self) -> ModelCard:
        """The model's card, asked for once: one application serves one version."""
        if self.card is None:
            self.card = await self.model.describe.remote()
        return self.card

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """200 once a replica has loaded the model, else 503."""
        application = serve.get_replica_context().app_name
        # Asked of the controller, not of the model, which would answer late under load.
        status = await asyncio.to_thread(serve.status)
        replicas = status.applications[application].deployments["Model"].replica_states
        if not any(state == "RUNNING" and count for state, count in replicas.items()):
            raise APIError(503, "the model is not loaded", code="model_not_loaded")
        return {"status": "ok"}

    @api.get("/v1/models")
    async def models(self) -> ModelList:
        """The served model."""
        return ModelList(data=[await self._card()])

    @api.post("/v1/images/generations")
    async def generate(self, request: ImageRequest) -> ImageResponse:
        """Draw `n` pictures of a prompt."""
        if self.num_open >= self.limits.max_queued_requests:
            raise APIError(503, "too many requests are waiting; try again later", code="queue_full")
        self.num_open += 1
        try:
            async with asyncio.timeout(self.limits.request_timeout_s):
                rows = self._rows(request, await self._card())
                pictures = await asyncio.gather(*(self.model.draw.remote(row) for row in rows))
        except TimeoutError:
            seconds = f"{self.limits.request_timeout_s:g}"
            message = f"not drawn within {seconds} s; ask for fewer steps or pictures, or try later"
            raise APIError(504, message, code="timeout") from None
        except RayTaskError as error:
            if isinstance(error.cause, APIError):
                raise error.cause from None
            raise APIError(500, f"drawing failed: {error.cause}", code="drawing_failed") from error
        except (RayError, RayServeException) as error:
            raise APIError(503, "the model stopped while drawing; try again", code="model_lost") from error
        finally:
            self.num_open -= 1
        encoded = [base64.b64encode(picture).decode() for picture in pictures]
        data = [ImageData(b64_json=text, seed=row.seed) for text, row in zip(encoded, rows, strict=True)]
        return ImageResponse(created=int(time.time()), data=data)

    def _rows(self, request: ImageRequest, card: ModelCard) -> list[Row]:
        """One row a picture, the server's defaults filled in; refuses what this model cannot do."""
        if request.model not in (None, card.id):
            message = f"the model {request.model!r} does not exist; this server has {card.id!r}"
            raise APIError(404, message, param="model", code="model_not_found")
        if request.size not in (None, card.size):
            message = f"size: {request.size!r} is not supported; this model draws {card.size}"
            raise APIError(400, message, param="size", code="invalid_value")
        seed = random.randint(0, MAX_SEED) if request.seed is None else request.seed
        steps = request.steps or self.limits.default_steps
        guidance_scale = request.guidance_scale or self.limits.default_guidance_scale
        return [
            # Wraps around, so that every seed in an answer is one that a request may name.
            Row(request.prompt, (seed + i) % (MAX_SEED + 1), steps, guidance_scale)
            for i in range(request.n)
        ]


def build_application(config: Config, registered: RegisteredModel) -> serve.Application:
    """The Serve application of one registered version."""
    settings = config.serve
    # Here, because a replica may run in another folder.
    registered = replace(registered, base=resolve_path(registered.base))
    model = Model.options(  # type: ignore[attr-defined]
        num_replicas=settings.replicas,
        # A full batch may wait in the replica while another is drawn.
        max_ongoing_requests=2 * settings.max_batch_size,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(settings.use_gpu)},
    ).bind(config, registered)
    ingress = Ingress.options(  # type: ignore[attr-defined]
        # Counts its open requests itself, and has room beyond them to say 503 and to answer probes.
        max_ongoing_requests=settings.max_queued_requests + 64,
        ray_actor_options={"num_cpus": 0.1},
    )
    return ingress.bind(config, model)


def build(args: dict[str, Any]) -> serve.Application:
    """For `serve run serving.app:build config=configs/demo.yaml`, and for a RayService."""
    config = load_config(args["config"])
    return build_application(config, champion(config))
