"""One HTTP request and its answer, as ASGI messages: the body with its limits, the answer watched on its way,
the work ended when the client goes."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from serving.schemas import APIError

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

CLIENT_LEFT = 499
"""The status, in logs and metrics only, of a request whose client left before the answer was complete."""


class ClientLeft(Exception):
    """The client closed its connection."""


class Exchange:
    """What is known of a request while it is answered.

    Args:
        scope: of ASGI; `state` becomes a dictionary of this request's own.
        receive, send: of ASGI.
        headers: added to the answer.

    Attributes:
        on_end: called once, when the answer is complete or there will be none; background work that the
            application does afterwards may still be to come.
        status: of the answer.
        seconds: that it took.
        started, complete: whether the answer is.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str]) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.state: dict[str, Any] = {**scope.get("state", {})}
        scope["state"] = self.state
        self._headers = _encoded(headers)
        self.on_end: list[Callable[[], None]] = []
        self._began = time.perf_counter()
        self.status = 500  # until an answer begins
        self.seconds = 0.0
        self.started = self.complete = self._ended = False

    def header(self, name: bytes) -> str | None:
        """The first of the request's headers of that name (in lower case)."""
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key == name), None)

    async def read_body(self, max_bytes: int, timeout_s: float) -> bytes:
        """The whole body, of at most `max_bytes`, also of a client that does not tell its length.

        Raises:
            APIError: 413 if it is longer, 408 if it is not here in time, 400 for a length that is no number.
            ClientLeft: before its end.
        """
        told = self.header(b"content-length") or "0"
        if not (told.isascii() and told.isdigit()):
            raise APIError(400, "Content-Length must be a number")
        too_large = f"the body is larger than the {max_bytes} bytes that this server takes"
        if int(told) > max_bytes:
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
            raise APIError(408, f"the body did not come within {timeout_s:g} s", code="timeout") from None

    async def send(self, message: Message) -> None:
        """ASGI's send, for the application."""
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
        last = message["type"] == "http.response.pathsend" or (
            message["type"] == "http.response.body" and not message.get("more_body")
        )
        # Beforehand: the server tells of the end as of a disconnect, and work may go on after the answer.
        self.complete = self.complete or last
        await self._send(message)
        if last:
            self.end()

    async def answer(self, error: APIError) -> None:
        """Send an error as the whole answer."""
        body = json.dumps(error.body()).encode()
        told = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        await self.send({"type": "http.response.start", "status": error.status, "headers": _encoded(told)})
        await self.send({"type": "http.response.body", "body": body})

    def end(self) -> None:
        """The answer is complete, or there will be none; later calls do nothing."""
        if not self._ended:
            self._ended = True
            self.seconds = time.perf_counter() - self._began
            for each in self.on_end:
                each()

    async def run(self, app: ASGIApp, body: bytes) -> None:
        """Let the application answer; when the client leaves before the end, its work is cancelled.

        One task alone listens to the client, since servers do not promise each of several listeners the
        disconnect; the application hears of it from here.

        Raises:
            ClientLeft: and the application has ended.
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
            # Reached with both running if this request itself is cancelled, by a server that stops.
            work.cancel()
            watch.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]


def _replay(body: bytes, gone: asyncio.Event) -> Receive:
    """A `receive` that gives a body that was read, and then waits for the client to go."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive
