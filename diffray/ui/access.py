"""Who may use the page: a browser on this machine or, with keys, whoever has one.

Keys are those of the endpoint (`diffray keys`). One of the scope `admin` may do everything; one of `generate`
may draw with a run's endpoint, by programs. A browser sends its key once and gets a cookie for it, which
pictures and reports need too. Changes that another site's page sends are refused.
"""

import re
import secrets
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from diffray.runs import LOCAL_HOSTS
from ray_jobs.review.app import HEADERS
from serving.http.access import CHALLENGE
from serving.http.api_keys import KeyRing, Scope

COOKIE = "diffray-ui"
PUBLIC = ("/", "/style.css", "/icon.svg", "/session")
DRAW = re.compile("/runs/[^/]+/draw")  # and not the run that is named so
PAGE_HEADERS = HEADERS | {
    # Curves have their colours in attributes, and drawn pictures are kept in the browser; scripts and sheets
    # are files of the page.
    "Content-Security-Policy": HEADERS["Content-Security-Policy"].replace("img-src", "img-src blob:")
    + "; style-src-attr 'unsafe-inline'; frame-src 'self'"
}
DOCUMENT_HEADERS = HEADERS | {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox; "
    "frame-ancestors 'self'"
}
"""Headers of reports, which hold their own style and pictures."""

MAX_BODY = 100_000  # bytes of a request that is no upload
KINDS = ("application/json", "application/octet-stream")
Next = Callable[[Request], Awaitable[Response]]


class Access:
    """Guard of the page, and its sessions.

    Args:
        keys: keys that are asked for; None: nobody needs one.
        is_local: whether the page listens on this machine only, so that its own names are the only ones.
    """

    def __init__(self, keys: KeyRing | None, *, is_local: bool) -> None:
        assert keys or is_local, "a page for other machines asks for keys"
        self.keys, self.is_local = keys, is_local
        self._sessions: dict[str, str] = {}

    async def __call__(self, request: Request, answer: Next) -> Response:
        """Answer a request if it may be answered; for `FastAPI.middleware`."""
        if refused := self._refusal(request):
            response: Response = refused
        else:
            response = await answer(request)
        response.headers.update({k: v for k, v in PAGE_HEADERS.items() if k not in response.headers})
        return response

    def open_session(self, token: str) -> Response:
        """Answer with a cookie for a key, or with the reason why not."""
        if problem := self._problem_of(token, "admin"):
            return _refused(401, problem)
        session = secrets.token_urlsafe(32)
        self._sessions[session] = token
        response = Response(status_code=204)
        response.set_cookie(COOKIE, session, httponly=True, samesite="strict")
        return response

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if self.is_local and _hostname(host) not in LOCAL_HOSTS:
            return _refused(403, f"this page is served as {', '.join(LOCAL_HOSTS)}, not as {host}")
        path = request.scope["path"]  # unlike that of `request.url`, whatever the header Host says
        kind, _, bearer = request.headers.get("authorization", "").partition(" ")
        if request.method not in ("GET", "HEAD"):
            origin = request.headers.get("origin", "")
            if not request.headers.get("content-type", "").startswith(KINDS):
                return _refused(415, f"send {' or '.join(KINDS)}")
            # Without a key nobody may fill the memory; uploads have a limit of their own, behind this one.
            length = request.headers.get("content-length", "0")
            is_long = "transfer-encoding" in request.headers or int(length) > MAX_BODY
            if is_long and path != "/uploads":
                return _refused(413, f"send at most {MAX_BODY:,} bytes")
            if origin.partition("://")[2] != host and (origin or not bearer):
                return _refused(403, "changes are made by this page only, or with a key by programs")
        if self.keys is None or path in PUBLIC or path.startswith("/web/"):
            return None
        token = (
            bearer if kind.lower() == "bearer" else self._sessions.get(request.cookies.get(COOKIE, ""), "")
        )
        scope: Scope = "generate" if DRAW.fullmatch(path) else "admin"
        problem = self._problem_of(token.strip(), scope)
        return _refused(401, problem) if problem else None

    def _problem_of(self, token: str, scope: Scope) -> str:
        """Return what is wrong with a key; empty if nothing is."""
        if self.keys is None:
            return ""
        if not token:
            return "this page asks for an API key"
        key = self.keys.find(token)
        if key is None:
            return "this key is unknown, expired or revoked"
        if not key.scopes & {scope, "admin"}:
            return f"the key {key.id} lacks the scope {scope!r}; make one with `diffray keys add`"
        return ""


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:  # as of "[::1"
        return None


def _refused(status: int, reason: str) -> JSONResponse:
    headers = {"WWW-Authenticate": CHALLENGE} if status == 401 else None
    return JSONResponse({"detail": reason, "field": None}, status, headers)
