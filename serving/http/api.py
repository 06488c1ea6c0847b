"""The endpoint's HTTP API: OpenAI's Images API, probes, and operator routes."""

import base64
import json
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serving.encoding import MEDIA_TYPES
from serving.http.access import needed_scope
from serving.http.asgi_exchange import context_of
from serving.http.feedback import feedback_router
from serving.http.jobs import accepted, jobs_router, prefers_async
from serving.http.logs import LOGGER
from serving.http.multipart import form_fields
from serving.http.studies import studies_router
from serving.jobs import Job, Kind
from serving.messages import label
from serving.schemas import (
    APIError,
    EditRequest,
    ErrorResponse,
    ImageEvent,
    ImageRequest,
    ImageResponse,
    ModelCard,
    ModelList,
    Readiness,
    VariationRequest,
    invalid_request,
    limited,
)
from serving.service.given_files import NO_FILES, GivenFiles
from serving.service.metrics import CONTENT_TYPE
from serving.service.picture_links import PATH as PICTURES_PATH
from serving.service.request_context import RequestContext
from serving.service.rollout import RolloutStatus
from serving.service.service import Service

WEB = Path(__file__).parents[1] / "web"  # files of the web page
PAGE_HEADERS = {
    "Cache-Control": "no-cache",  # cached, but revalidated each time; 304 while a file is unchanged
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
PICTURE_HEADERS = {
    "Access-Control-Allow-Origin": "*",  # the address is the permission, for pages of any site
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
}
IMAGE_FIELDS = ("image", "image[]")  # of an edit; OpenAI's clients send lists by the second name
MASK_FIELD, CONTROL_FIELD = "mask", "control_image"
Responses = dict[int | str, dict[str, Any]]  # by status, as FastAPI takes them
KINDS = ("image_generation", "image_edit")  # event kinds, by OpenAI's names
ERROR_DESCRIPTIONS = {
    400: "A field is invalid; `param` names it.",
    401: "The API key is missing or invalid.",
    403: "The key lacks the required scope.",
    404: "The model or the picture does not exist.",
    410: "The address has expired.",
    413: "The body is too large.",
    429: "A limit of this client is reached; retry after Retry-After seconds.",
    500: "Image generation failed.",
    503: "Too many open requests, or the model is unavailable.",
    504: "The request timed out.",
}


def create_api(service: Service) -> FastAPI:
    """Create the HTTP application of a service. Add middlewares from the innermost to the outermost."""
    api = FastAPI(
        title="diffray",
        summary="Image generation compatible with OpenAI's Images API",
        version="1",
        # FastAPI's documentation pages run third-party scripts on the origin where the page at / keeps a key.
        docs_url=None,
        redoc_url=None,
    )
    api.add_exception_handler(APIError, _answer_error)
    api.add_exception_handler(RequestValidationError, _answer_invalid)
    api.add_exception_handler(HTTPException, _answer_http)
    _add_drawing(api, service)
    _add_pictures(api, service)
    _add_operation(api, service)
    api.include_router(jobs_router(service.jobs))
    api.include_router(feedback_router(lambda: service.feedback, _key_id))
    api.include_router(studies_router(service.config, lambda: service.feedback, _key_id))
    _add_page(api)
    _document(api, service.settings.allow_anonymous)
    return api


def _add_drawing(api: FastAPI, service: Service) -> None:
    """Add the routes for clients: generations, edits and models."""

    async def answer(
        kind: Kind,
        body: ImageRequest,
        request: Request,
        files: GivenFiles = NO_FILES,
    ) -> Response:
        context = _context(request)
        if prefers_async(request):
            if body.stream:
                raise APIError(400, "stream: not with Prefer: respond-async", "stream", "invalid_value")
            await service.check(body, context, files)
            return accepted(await service.jobs.submit(kind, body, context, files))
        if body.webhook_url:
            message = "webhook_url: announces the end of a job; send the header Prefer: respond-async"
            raise APIError(400, message, "webhook_url", "invalid_value")
        if not body.stream:
            return _json(await service.generate(body, context, files))
        return await EventStream.of(service.stream(body, context, files), context)

    async def generate(body: ImageRequest, request: Request) -> Response:
        """Generate `n` images from a prompt; with `stream`, one image after its previews."""
        return await answer("generations", body, request)

    async def edit(request: Request) -> Response:
        """Generate `n` images from those in `image`: references, or one to paint into or begin with."""
        body, files = await _edit_of(request, fields_of_edits)
        return await answer("edits", body, request, files)

    async def vary(request: Request) -> Response:
        """Generate `n` variations of an image: each begins with it."""
        body, files = await _edit_of(request, fields_of_variations)
        if files.mask is not None:
            raise APIError(400, "mask: send it to /v1/images/edits", MASK_FIELD, "unsupported_parameter")
        return await answer("variations", body, request, files)

    # So that FastAPI checks and documents the limits.
    generate.__annotations__["body"] = limited(ImageRequest, service.settings)
    fields_of_edits = limited(EditRequest, service.settings)
    fields_of_variations = limited(VariationRequest, service.settings)
    names = [f"{kind}.{stage}" for kind in KINDS for stage in ("partial_image", "completed")]
    event = {
        "type": "object",
        "properties": {
            "event": {"enum": [*names, "error"]},
            "data": {"type": "string", "description": "JSON with the event's name as its `type`"},
        },
        "required": ["event", "data"],
    }
    events = {"schema": event, "example": "event: image_generation.completed\ndata: {...}\n\n"}
    responses: Responses = {
        200: {"model": ImageResponse, "content": {"text/event-stream": events}},
        202: {"model": Job, "description": "With `Prefer: respond-async`: the job that draws it."},
        **_errors(400, 404, 413, 429, 500, 503, 504),
    }
    api.post("/v1/images/generations", responses=responses)(generate)
    for path, fields, route in (
        ("edits", fields_of_edits, edit),
        ("variations", fields_of_variations, vary),
    ):
        form = {"required": True, "content": {"multipart/form-data": {"schema": _form(fields)}}}
        api.post(f"/v1/images/{path}", responses=responses, openapi_extra={"requestBody": form})(route)

    @api.get("/v1/models")
    async def models() -> ModelList:
        """List the models that a request may name."""
        return ModelList(data=await cards())

    @api.get("/v1/models/{model}", responses=_errors(404))
    async def model(model: str) -> ModelCard:
        """Describe one model."""
        wanted = next((card for card in await cards() if card.id == model), None)
        if wanted is None:
            raise APIError(404, f"{model!r} is not served; see /v1/models", "model", "model_not_found")
        return wanted

    async def cards() -> list[ModelCard]:
        own = await service.replicas.traits()
        return [
            ModelCard(
                id=offer.id,
                created=service.started,
                version=offer.version and offer.version.version,
                size=f"{own.width}x{own.height}",
                references=own.max_references,
                masks=own.paints_masks,
                control=offer.version is not None and offer.version.follows_control,
            )
            for offer in service.catalogue.offers()
        ]


def _add_pictures(api: FastAPI, service: Service) -> None:
    """Add the route at which clients fetch pictures that they requested as addresses."""
    file = {"schema": {"type": "string", "format": "binary"}}
    content = dict.fromkeys(MEDIA_TYPES.values(), file)

    @api.get(
        f"/{PICTURES_PATH}/{{hour}}/{{file}}",
        response_class=Response,
        responses={200: {"content": content}, **_errors(404, 410, 503)},
    )
    def picture(hour: str, file: str, expires: int = 0, signature: str = "") -> Response:
        """Return a picture, by the address in an answer, which needs no key."""
        found = service.links.read(f"{hour}/{file}", expires, signature)
        kind = MEDIA_TYPES[file.rpartition(".")[2]]
        headers = {
            **PICTURE_HEADERS,
            "Cache-Control": f"private, max-age={max(0, expires - int(time.time()))}",
        }
        return Response(found, media_type=kind, headers=headers)


def _add_operation(api: FastAPI, service: Service) -> None:
    """Add the routes for operators and the cluster: probes, rollout and metrics."""

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Return 200 while this process lives."""
        return {"status": "ok"}

    @api.get("/readyz", responses=_errors(503))
    async def readyz() -> Readiness:
        """Return 200 while requests can be answered, else 503 with the reason."""
        await service.replicas.check_running(may_sleep=not service.settings.min_replicas)
        return Readiness(model=label(service.catalogue.champion), notice=service.watcher.notice)

    @api.get("/v1/rollout")
    async def rollout() -> RolloutStatus:
        """Compare champion and candidate: answers since the endpoint started, and feedback."""
        return await service.rollout()

    text = {"schema": {"type": "string"}}

    @api.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": text}}})
    async def metrics() -> Response:
        """Return metrics in Prometheus' text format."""
        return Response(await service.metrics_text(), media_type=CONTENT_TYPE)


def _add_page(api: FastAPI) -> None:
    """Add the web page at `/`, with its files below `/web/`."""
    files = PageFiles(directory=WEB)
    api.mount("/web", files, name="web")

    @api.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)


class PageFiles(StaticFiles):
    """Files of the web page, with headers that forbid third-party content and framing."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response


def _context(request: Request) -> RequestContext:
    """Return a request's context, with the address at which its client reached the application."""
    context = context_of(request.scope)
    context.base_url = str(request.base_url)
    return context


class EventStream(StreamingResponse):
    """Server-sent events whose source is closed with the connection."""

    @classmethod
    async def of(cls, events: AsyncGenerator[ImageEvent], context: RequestContext) -> "EventStream":
        """Return the stream once it has its first event, so that earlier errors get their own HTTP status.

        Args:
            context: facts about the request; later errors are recorded in it.
        """
        try:
            first = await anext(events)
        except BaseException:
            await events.aclose()
            raise
        return cls(
            _as_text(first, events, context),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


async def _as_text(
    first: ImageEvent, events: AsyncGenerator[ImageEvent], context: RequestContext
) -> AsyncGenerator[str]:
    """Yield events as text, each named by its type; an error becomes the last event."""
    try:
        yield _event(first.type, first.model_dump_json())
        async for event in events:
            yield _event(event.type, event.model_dump_json())
    except APIError as error:
        context.stream_status = error.status
        yield _event("error", json.dumps(_for_client(error, context).body()))
    finally:
        await events.aclose()


async def _edit_of(request: Request, model: type[EditRequest]) -> tuple[EditRequest, GivenFiles]:
    """Return the fields and the files of an edit form."""
    fields = form_fields(request.headers.get("content-type", ""), await request.body())
    images = tuple(content for name, content in fields if name in IMAGE_FIELDS)
    if not any(images):
        raise APIError(400, "image: missing; send an image file", "image", "invalid_value")
    texts: dict[str, str] = {}
    mask: bytes | None = None
    for name, content in fields:
        if name in IMAGE_FIELDS:
            continue
        if name in texts or (name == MASK_FIELD and mask is not None):
            raise APIError(400, f"{name}: given more than once", name, "invalid_value")
        if name == MASK_FIELD:
            mask = content
            continue
        if name == CONTROL_FIELD and not content.isascii():  # a file; else base64, as JSON has it
            texts[name] = base64.b64encode(content).decode()
            continue
        try:
            # Unsupported fields, such as markup, are refused by name, whatever their content.
            texts[name] = content.decode(errors="strict" if name in model.model_fields else "replace")
        except UnicodeDecodeError:
            raise APIError(400, f"{name}: must be UTF-8", name, "invalid_value") from None
    try:
        return model.model_validate(texts), GivenFiles(images, mask)
    except ValidationError as error:
        raise invalid_request(error.errors()[0]) from None


def _form(model: type[EditRequest]) -> dict[str, object]:
    """Return the schema of a form with images."""
    schema = model.model_json_schema()
    schema["properties"]["image"] = {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "minItems": 1,
        "description": "PNG, JPEG or WebP. Several references are several fields of this name, or `image[]`.",
    }
    schema.setdefault("required", []).append("image")
    if issubclass(model, VariationRequest):
        return schema
    schema["properties"][MASK_FIELD] = {
        "type": "string",
        "format": "binary",
        "description": "A PNG of the first image's size, transparent where that is to be painted; the rest "
        "stays as it is.",
    }
    schema["properties"][CONTROL_FIELD] |= {"type": "string", "format": "binary"}
    return schema


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


def _json(content: object) -> Response:
    """Return a JSON response for a pydantic model or plain values."""
    if isinstance(content, BaseModel):
        return Response(content.model_dump_json(), media_type="application/json")
    return JSONResponse(content)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    error = _for_client(error, context_of(request.scope))
    return JSONResponse(error.body(), error.status, error.headers)


def _for_client(error: APIError, context: RequestContext) -> APIError:
    """Record an error for the outer layers; return it without what a replica's exception says of the server,
    which is logged instead."""
    context.reason = error.code
    shown = error.for_client(context.request_id)
    if shown is not error:
        fields = {"request_id": context.request_id}
        LOGGER.error("image generation failed", exc_info=error, extra={"fields": fields})
    return shown


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _answer_error(request, invalid_request(error.errors()[0]))


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    answer = await _answer_error(request, APIError(error.status_code, message))
    answer.headers.update(error.headers or {})
    return answer


def _key_id(request: Request) -> str | None:
    """Return the id of the request's checked API key; None if it has none."""
    return context_of(request.scope).key


def _errors(*statuses: int) -> Responses:
    """Return the error responses of a route, for the OpenAPI document."""
    return {
        status: {"model": ErrorResponse, "description": ERROR_DESCRIPTIONS[status]} for status in statuses
    }


def _document(api: FastAPI, allow_anonymous: bool) -> None:
    """Extend FastAPI's OpenAPI document by the keys that operations require, and remove the status 422 for
    invalid requests, which OpenAI's API does not use."""
    make = api.openapi
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    refusals = {
        str(status): {"description": ERROR_DESCRIPTIONS[status], "content": error} for status in (401, 403)
    }

    def openapi() -> dict[str, Any]:
        document = make()
        bearer = {"type": "http", "scheme": "bearer", "description": "API key of this server"}
        document["components"]["securitySchemes"] = {"key": bearer}
        for path, operations in document["paths"].items():
            scope = needed_scope(path)
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if scope:
                    operation["responses"] |= refusals
                    operation["security"] = [{"key": []}, *([{}] if allow_anonymous else [])]
        return document

    api.openapi = openapi  # type: ignore[method-assign]
