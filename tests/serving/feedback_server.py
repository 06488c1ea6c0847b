"""A FastAPI application with the feedback router under a real HTTP server, in a thread."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from serving.feedback.store import FeedbackStore
from serving.http.feedback import feedback_router
from serving.schemas import APIError, invalid_request

FEEDBACK_KEY = "secret"


def key_id(request: Request) -> str:
    """As the endpoint's check of API keys would: the key's id, or a 401."""
    if request.headers.get("Authorization") != f"Bearer {FEEDBACK_KEY}":
        raise APIError(401, "give an API key", code="invalid_api_key")
    return "key-1"


def application() -> FastAPI:
    api = FastAPI()

    @api.exception_handler(APIError)
    async def answer_error(_: Request, error: APIError) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @api.exception_handler(RequestValidationError)
    async def answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await answer_error(request, invalid_request(error.errors()[0]))

    return api


@contextmanager
def served(api: FastAPI) -> Iterator[str]:
    """The URL of an application while the block runs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(api, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def feedback_server(store: FeedbackStore) -> Iterator[str]:
    api = application()
    api.include_router(feedback_router(lambda: store, key_id))
    with served(api) as url:
        yield url
