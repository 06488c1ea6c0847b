"""One HTTP request and its answer as ASGI messages: limit the body, observe the answer, and cancel the work
when the client disconnects."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.schemas import APIError
from serving.service.request_context import RequestContext

CLIENT_LEFT = 499
"""Status, in logs and metrics only, of a request whose client left before the answer was complete."""


class ClientLeft(Exception):
    """The client closed its connection."""


def context_of(scope: Scope) -> RequestContext:
    """Return the request's context; a new one, which is kept, if no outer layer made one."""
    context = scope.setdefault("state", {}).setdefault("context", RequestContext())
    assert isinstance(context, RequestContext)
    return context


class Exchange:
    """State of a request while it is answered.

    Args:
        scope: ASGI scope; its `state` is replaced by a copy that holds `context`, see `context_of`.
        receive, send: ASGI callables.
        headers: headers to add to the answer.

    Attributes:
        context: facts about the request.
        on_end: callbacks, each called once when the answer is complete or there will be none; background work
            of the application may follow.
        status: HTTP status of the answer.
        seconds: duration of the answer.
        started, complete: progress of the answer.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str]) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.context = RequestContext()
        scope["state"] = {**scope.get("state", {}), "context": self.context}
        self._headers = _encoded(headers)
        self.on_end: list[Callable[[], None]] = []
        self._began = time.perf_counter()
        self.status = 500  # until an answer begins
        self.seconds = 0.0
        self.started = self.complete = self._ended = False

    def header(self, name: bytes) -> str | None:
        """Return the request's first header of this name (in lower case), if any."""
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key == name), None)

    async def read_body(self, max_bytes: int, timeout_s: float) -> bytes:
        """Read the whole body, at most `max_bytes`, even if the client does not state its length.

        Raises:
            APIError: 413 if it is too long, 408 if it does not arrive in time, 400 if the stated length is
                not a number.
            ClientLeft: the client left before the end of the body.
        """
        stated = self.header(b"content-length") or "0"
        if not (stated.isascii() and stated.isdigit()):
            raise APIError(400, "Content-Length must be a number")
        too_large = f"the body is larger than the {max_bytes} bytes that this server accepts"
        if int(stated) > max_bytes:
            raise APIError(413, too_large, code="request_too_large")
        chunks, length = [], 0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    chunks.append(message.get("body", b""))
                    length += len(chunks[-1])
                    if length > max_bytes:
                        raise APIError(413, too_large, code="request_too_large")
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            raise APIError(408, f"the body did not arrive within {timeout_s:g} s", code="timeout") from None

    async def send(self, message: Message) -> None:
        """Send an ASGI message of the application, adding the headers and observing the answer."""
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
        last = message["type"] == "http.response.pathsend" or (
            message["type"] == "http.response.body" and not message.get("more_body")
        )
        # Set before sending: the server reports the end as a disconnect, and work may continue afterwards.
        self.complete = self.complete or last
        await self._send(message)
        if last:
            self.end()

    async def answer(self, error: APIError) -> None:
        """Send an error as the whole answer."""
        body = json.dumps(error.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        await self.send({"type": "http.response.start", "status": error.status, "headers": _encoded(headers)})
        await self.send({"type": "http.response.body", "body": body})

    def end(self) -> None:
        """Run the `on_end` callbacks when the answer is complete or there will be none; later calls do
        nothing."""
        if not self._ended:
            self._ended = True
            self.seconds = time.perf_counter() - self._began
            for each in self.on_end:
                each()

    async def run(self, app: ASGIApp, body: bytes) -> None:
        """Let the application answer; cancel its work if the client leaves before the end.

        A single task listens to the client, since servers do not guarantee that each of several listeners
        gets the disconnect; it is passed on to the application.

        Raises:
            ClientLeft: the client left, and the application has ended.
        """
        gone = asyncio.Event()
        work = asyncio.ensure_future(app(self.scope, _replay(body, gone), self.send))
        watch = asyncio.ensure_future(self._disconnect())
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work.done() or self.complete:
                await work
                return
            gone.set()
            work.cancel()
            (failure,) = await asyncio.gather(work, return_exceptions=True)
            raise ClientLeft from failure if isinstance(failure, Exception) else None
        finally:
            # Both still run here if this request itself is cancelled by a server that stops.
            work.cancel()
            watch.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]


def _replay(body: bytes, gone: asyncio.Event) -> Receive:
    """Return a `receive` that yields a body read before, and then waits until the client is gone."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive
