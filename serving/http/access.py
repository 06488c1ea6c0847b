"""Who may ask, and how much: one layer around the whole HTTP application.

Each request gets an id, is matched with a key, and is held to the key's scopes and limits and to the size of
its body before the application sees it; afterwards it is counted and logged. Plain ASGI, so that answers
stream through it untouched and a client that leaves is noticed at once.
"""

import asyncio
import ipaddress
import logging
import re
import uuid

from ray_jobs.config import ServeConfig
from serving.http.api_keys import Key, KeyRing
from serving.http.asgi_exchange import CLIENT_LEFT, ASGIApp, ClientLeft, Exchange, Receive, Scope, Send
from serving.http.limits import ConcurrencyLimit, RateLimit
from serving.http.logs import LOGGER, log_request
from serving.schemas import APIError
from serving.service.metrics import Metrics
from serving.service.request_context import ANONYMOUS

PUBLIC = frozenset({"/", "/healthz", "/readyz", "/openapi.json"})
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})  # asked all the time: logged only for debugging
# A browser says so of forms that any page may send to this one's address (W3C, Fetch Metadata).
OTHER_SITES = frozenset({"cross-site", "same-site"})
CHALLENGE = 'Bearer realm="diffray"'
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def needed_scope(path: str, public_folders: tuple[str, ...] = ()) -> str | None:
    """The scope that a path asks for; None: everybody may. A path that nobody thought of needs `admin`."""
    if path in PUBLIC or path.startswith(public_folders):
        return None
    if path.startswith(("/v1/admin", "/v1/rollout")) or not path.startswith("/v1/"):
        return "admin"
    return "feedback" if path == "/v1/feedback" or path.startswith("/v1/feedback/") else "generate"


def is_drawing(method: str, path: str) -> bool:
    """Whether a request is one for pictures: these alone are limited, and stand in the latencies."""
    return method == "POST" and path.startswith("/v1/images/")


def client_of(scope: Scope) -> str:
    """What anonymous clients are told apart by: the address, of IPv6 the /64 network that one owner has."""
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
    """The layer, as ASGI middleware: `api.add_middleware(Access, settings=..., keys=..., metrics=...)`.

    The application finds `key_id` (of anonymous requests "anonymous") and `request_id` in `request.state`,
    and leaves there what it knows of the request: `logs.REQUEST_FACTS`, and `prompt`.

    Args:
        app: of ASGI.
        settings: limits, and whether requests without a key are answered.
        keys: `KeyRing.of(settings)`; None: every request is anonymous, whatever its Authorization says.
        metrics: where requests are counted.
        rate, concurrency: what counts the limits; for a clock of one's own.
        public_folders: paths below these need no key: the files of the page.
        sends_request_id: whether answers get X-Request-ID; False behind a proxy that adds it, as Ray Serve's
            does.
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
        """One request; messages that are not HTTP's pass, but for WebSockets, which nothing here serves."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            request_id = _request_id(scope)
            headers = {"x-request-id": request_id} if self.sends_request_id else {}
            exchange = Exchange(scope, receive, send, headers)
            exchange.state["request_id"] = request_id
            exchange.on_end.append(lambda: self._record(exchange))
            await self._answer(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        """Admit, let the application answer, and answer what goes wrong."""
        try:
            self._admit(exchange)
            # Strangers have no say about our memory: what needs no key takes no body.
            max_bytes = self.settings.max_body_mb << 20 if "key_id" in exchange.state else 0
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
                    raise  # the server breaks the connection off, so that no part is taken for the whole
            elif isinstance(error, APIError):
                exchange.state.setdefault("reason", error.code)
                await exchange.answer(error)
            else:
                _log_failure(exchange, "failed", error)
                await exchange.answer(APIError(500, "the server failed; its log knows this request's id"))
        finally:
            exchange.end()

    def _admit(self, exchange: Exchange) -> None:
        """Find the key, hold the request to it, and take its place among the client's requests.

        Raises:
            APIError: 401, 403 or 429.
        """
        method, path = exchange.scope["method"], _path(exchange.scope)
        scope = needed_scope(path, self.public_folders)
        if scope is None or (path == "/metrics" and self.settings.allow_anonymous):
            return
        key = self._key(exchange.header(b"authorization"))
        exchange.state["key_id"] = key.id if key else ANONYMOUS
        if key is None and method == "POST" and exchange.header(b"sec-fetch-site") in OTHER_SITES:
            message = "a page of another site may not ask here without a key"
            raise APIError(403, message, code="insufficient_scope")
        if key is not None and scope not in key.scopes:
            message = f"the key {key.id} lacks the scope {scope!r} that {path} needs"
            challenge = {"www-authenticate": f'{CHALLENGE}, error="insufficient_scope", scope="{scope}"'}
            raise APIError(403, message, code="insufficient_scope", headers=challenge)
        if is_drawing(method, path):
            self._take_place(exchange, key)

    def _key(self, authorization: str | None) -> Key | None:
        """The key of a request; None if it is anonymous and may be.

        A key that is wrong is refused even where none is needed, so that nobody takes it for accepted.
        """
        kind, _, token = (authorization or "").partition(" ")
        if self.keys is None or (authorization is None and self.settings.allow_anonymous):
            return None
        if kind.lower() != "bearer" or not token.strip():
            message = "give a key of this server, as `Authorization: Bearer KEY`"
            headers = {"www-authenticate": CHALLENGE}
            raise APIError(401, message, code="invalid_api_key", headers=headers)
        key = self.keys.find(token.strip())
        if key is None:
            headers = {"www-authenticate": f'{CHALLENGE}, error="invalid_token"'}
            raise APIError(401, "this key is unknown, expired or revoked", None, "invalid_api_key", headers)
        return key

    def _take_place(self, exchange: Exchange, key: Key | None) -> None:
        """Count a drawing request against its client's limits, until it ends.

        Raises:
            APIError: 429, with the seconds after which to try again.
        """
        client = key.id if key else client_of(exchange.scope)
        at_once = (key and key.concurrent_requests) or self.settings.concurrent_requests
        a_minute = (key and key.requests_per_minute) or self.settings.requests_per_minute
        # First, so that what is refused for this costs no token.
        if self.concurrency.is_full(client, at_once):
            message = f"{at_once} requests are being answered for this client, which is its limit"
            # When one of them ends is not known; a second is a short try.
            raise APIError(429, message, None, "concurrency_limit_exceeded", {"retry-after": "1"})
        seconds = self.rate.take(client, a_minute)
        if seconds:
            message = f"the limit of {a_minute} requests a minute is reached; try again in {seconds} s"
            raise APIError(429, message, None, "rate_limit_exceeded", {"retry-after": str(seconds)})
        self.concurrency.enter(client)
        self.metrics.open_requests.inc()
        exchange.on_end[:0] = [lambda: self.concurrency.leave(client), self.metrics.open_requests.dec]

    def _record(self, exchange: Exchange) -> None:
        """Count and log a request that has ended."""
        method, path, state = exchange.scope["method"], _path(exchange.scope), exchange.state
        # A stream that goes wrong has begun with 200; its last event is the error.
        status = state.get("stream_status", exchange.status)
        if status >= 400 and state.get("reason"):
            self.metrics.rejected(state["reason"])
        if is_drawing(method, path):
            self.metrics.answered(status, exchange.seconds, state)
        log_request(
            method=method,
            path=path,
            status=status,
            seconds=exchange.seconds,
            state=state,
            log_prompts=self.settings.log_prompts,
            level=logging.DEBUG if path in PROBES else logging.INFO,
        )


def _request_id(scope: Scope) -> str:
    """The client's X-Request-ID if it is one that may stand in logs, else a new one."""
    told = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return told if REQUEST_ID.fullmatch(told) else uuid.uuid4().hex


def _path(scope: Scope) -> str:
    """The path below the prefix at which the application is mounted, as Starlette's routes see it."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


def _log_failure(exchange: Exchange, message: str, error: BaseException) -> None:
    ids = {name: exchange.state.get(name) for name in ("request_id", "key_id")}
    LOGGER.error(message, exc_info=error, extra={"fields": ids})
