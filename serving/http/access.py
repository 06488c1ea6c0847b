"""Access control and limits, in one layer around the whole HTTP application.

Each request gets an id and is matched with a key. The key's scopes and limits and the body size are enforced
before the application sees the request; afterwards it is counted and logged. The layer is plain ASGI, so that
answers stream through it unchanged and a disconnect is noticed at once.
"""

import asyncio
import ipaddress
import logging
import re
import uuid

from starlette.types import ASGIApp, Receive, Scope, Send

from ray_jobs.config import ServeConfig
from serving.http.api_keys import Key, KeyRing
from serving.http.asgi_exchange import CLIENT_LEFT, ClientLeft, Exchange
from serving.http.limits import ConcurrencyLimit, RateLimit
from serving.http.logs import LOGGER, log_request
from serving.schemas import APIError
from serving.service.metrics import Metrics
from serving.service.picture_links import PATH as PICTURES_PATH
from serving.service.request_context import ANONYMOUS

PUBLIC = frozenset({"/", "/healthz", "/readyz", "/openapi.json"})
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})  # requested all the time: logged at debug level only
# Browsers send these values with forms that other sites submit to this address (W3C, Fetch Metadata).
OTHER_SITES = frozenset({"cross-site", "same-site"})
CHALLENGE = 'Bearer realm="diffray"'
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def needed_scope(path: str, public_folders: tuple[str, ...] = ()) -> str | None:
    """Return the scope that a path requires; None for public paths, and for pictures, whose addresses are
    signed. Unknown paths require `admin`."""
    if path in PUBLIC or path.startswith((f"/{PICTURES_PATH}/", *public_folders)):
        return None
    if path.startswith(("/v1/admin", "/v1/rollout")) or not path.startswith("/v1/"):
        return "admin"
    return "feedback" if path == "/v1/feedback" or path.startswith("/v1/feedback/") else "generate"


def is_drawing(method: str, path: str) -> bool:
    """Return True for image requests; only these are limited, and counted in the latencies."""
    return method == "POST" and path.startswith("/v1/images/")


def client_of(scope: Scope) -> str:
    """Return the identity of an anonymous client: its IPv4 address, or its IPv6 /64 network, which usually
    belongs to a single owner."""
    host = (scope.get("client") or ("unknown",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"address:{host}"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return f"address:{address.ipv4_mapped}"
        return f"address:{ipaddress.ip_network((int(address), 64), strict=False)}"
    return f"address:{address}"


class Access:
    """ASGI middleware: `api.add_middleware(Access, settings=..., keys=..., metrics=...)`.

    It makes the request's context (`asgi_exchange.context_of`) with the request's id and its key's. The
    application adds the facts that it knows.

    Args:
        app: ASGI application.
        settings: limits, and permission for requests without a key.
        keys: `KeyRing.of(settings)`; None: every request is anonymous, whatever its Authorization header.
        metrics: metrics in which requests are counted.
        rate, concurrency: counters of the limits; pass them to use another clock.
        public_folders: paths below these need no key, such as the web page's files.
        sends_request_id: add X-Request-ID to answers; False behind a proxy that adds it, such as Ray Serve's.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: ServeConfig,
        keys: KeyRing | None,
        metrics: Metrics,
        rate: RateLimit | None = None,
        concurrency: ConcurrencyLimit | None = None,
        public_folders: tuple[str, ...] = ("/web/",),
        sends_request_id: bool = True,
    ) -> None:
        assert keys is not None or settings.allow_anonymous, "KeyRing.of refuses this"
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics
        self.rate = RateLimit() if rate is None else rate
        self.concurrency = ConcurrencyLimit() if concurrency is None else concurrency
        self.public_folders, self.sends_request_id = public_folders, sends_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection: HTTP requests are checked, WebSockets refused, and other types passed on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            request_id = _request_id(scope)
            headers = {"x-request-id": request_id} if self.sends_request_id else {}
            exchange = Exchange(scope, receive, send, headers)
            exchange.context.request_id = request_id
            exchange.on_end.append(lambda: self._record(exchange))
            await self._answer(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        """Admit the request, let the application answer, and turn exceptions into answers."""
        try:
            self._admit(exchange)
            # Public paths accept no body, so that strangers cannot occupy memory.
            max_bytes = self.settings.max_body_mb << 20 if exchange.context.key_id else 0
            body = await exchange.read_body(max_bytes, self.settings.request_timeout_s)
            await exchange.run(self.app, body)
        except (ClientLeft, asyncio.CancelledError) as error:
            if not exchange.complete:
                exchange.status = CLIENT_LEFT
            if not isinstance(error, ClientLeft):
                raise
            if error.__cause__ is not None:
                _log_failure(exchange, "the client left, and its work failed as it ended", error.__cause__)
        except Exception as error:
            if exchange.started:
                _log_failure(exchange, "failed while it was answered", error)
                if not exchange.complete:
                    exchange.status = 500
                    raise  # the server aborts the connection, so that a part is not taken for the whole
            elif isinstance(error, APIError):
                exchange.context.reason = exchange.context.reason or error.code
                await exchange.answer(error)
            else:
                _log_failure(exchange, "failed", error)
                await exchange.answer(
                    APIError(
                        500, "internal server error; the server's log has details under this request's id"
                    )
                )
        finally:
            exchange.end()

    def _admit(self, exchange: Exchange) -> None:
        """Find the key, check its scope, and count the request against the client's limits.

        Raises:
            APIError: 401, 403 or 429.
        """
        method, path = exchange.scope["method"], _path(exchange.scope)
        scope = needed_scope(path, self.public_folders)
        if scope is None or (path == "/metrics" and self.settings.allow_anonymous):
            return
        key = self._key(exchange.header(b"authorization"))
        exchange.context.key_id = key.id if key else ANONYMOUS
        if key is None and method == "POST" and exchange.header(b"sec-fetch-site") in OTHER_SITES:
            message = "a request from a page of another site needs an API key"
            raise APIError(403, message, code="insufficient_scope")
        if key is not None and scope not in key.scopes:
            message = f"the key {key.id} lacks the scope {scope!r}, which {path} requires"
            challenge = {"www-authenticate": f'{CHALLENGE}, error="insufficient_scope", scope="{scope}"'}
            raise APIError(403, message, code="insufficient_scope", headers=challenge)
        if is_drawing(method, path):
            self._count_in(exchange, key)

    def _key(self, authorization: str | None) -> Key | None:
        """Return the key of a request; None if it is anonymous and this is allowed.

        A wrong key is refused even if none is required, so that it does not seem accepted.

        Raises:
            APIError: 401, the key is missing or wrong.
        """
        kind, _, token = (authorization or "").partition(" ")
        if self.keys is None or (authorization is None and self.settings.allow_anonymous):
            return None
        if kind.lower() != "bearer" or not token.strip():
            message = "missing API key; send it as `Authorization: Bearer KEY`"
            headers = {"www-authenticate": CHALLENGE}
            raise APIError(401, message, code="invalid_api_key", headers=headers)
        key = self.keys.find(token.strip())
        if key is None:
            headers = {"www-authenticate": f'{CHALLENGE}, error="invalid_token"'}
            raise APIError(401, "this key is unknown, expired or revoked", None, "invalid_api_key", headers)
        return key

    def _count_in(self, exchange: Exchange, key: Key | None) -> None:
        """Count an image request against its client's limits until it ends.

        Raises:
            APIError: 429, with the seconds until a retry.
        """
        client = key.id if key else client_of(exchange.scope)
        at_once = (key and key.concurrent_requests) or self.settings.concurrent_requests
        a_minute = (key and key.requests_per_minute) or self.settings.requests_per_minute
        # Checked first, so that a request refused for this costs no token.
        if self.concurrency.is_full(client, at_once):
            message = f"this client has {at_once} open requests, which is its limit"
            # It is unknown when one of them ends; 1 s is a short wait.
            raise APIError(429, message, None, "concurrency_limit_exceeded", {"retry-after": "1"})
        seconds = self.rate.take(client, a_minute)
        if seconds:
            message = f"the limit of {a_minute} requests per minute is reached; try again in {seconds} s"
            raise APIError(429, message, None, "rate_limit_exceeded", {"retry-after": str(seconds)})
        self.concurrency.enter(client)
        self.metrics.open_requests.inc()
        exchange.on_end[:0] = [lambda: self.concurrency.leave(client), self.metrics.open_requests.dec]

    def _record(self, exchange: Exchange) -> None:
        """Count and log a request that has ended."""
        method, path, context = exchange.scope["method"], _path(exchange.scope), exchange.context
        # A stream that fails has begun with status 200; its last event is the error.
        status = context.stream_status or exchange.status
        if status >= 400 and context.reason:
            self.metrics.rejected(context.reason)
        if is_drawing(method, path):
            self.metrics.answered(status, exchange.seconds, context)
        log_request(
            method=method,
            path=path,
            status=status,
            seconds=exchange.seconds,
            context=context,
            log_prompts=self.settings.log_prompts,
            level=logging.DEBUG if path in PROBES else logging.INFO,
        )


def _request_id(scope: Scope) -> str:
    """Return the client's X-Request-ID if it is safe for logs, else a new id."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode(
        "latin-1"
    )
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _path(scope: Scope) -> str:
    """Return the path below the application's mount prefix, as Starlette's routes see it."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


def _log_failure(exchange: Exchange, message: str, error: BaseException) -> None:
    ids = {"request_id": exchange.context.request_id, "key_id": exchange.context.key_id}
    LOGGER.error(message, exc_info=error, extra={"fields": ids})
