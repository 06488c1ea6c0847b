"""Page on which captions are read beside their pictures and corrected, for a browser on this machine.

It is served on the loopback interface only. Requests with another host name (DNS rebinding) and changes that
another site's page sends are refused.
"""

import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, StringConstraints

from ray_jobs.config import Config, ConfigError
from ray_jobs.data.sources.samples import fingerprint
from ray_jobs.report.dataset_page import STYLE
from ray_jobs.review.captions import Captions, Listed, open_captions
from ray_jobs.review.thumbnails import SIDES, Pictures

HERE = Path(__file__).parent
HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # by which a browser on this machine, or at the end of a tunnel, reaches it
PAGE_ROWS = 48
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
Next = Callable[[Request], Awaitable[Response]]
Show = Literal["all", "empty", "duplicate", "edited"]


class Edit(BaseModel):
    """A corrected caption, and the one that it replaces."""

    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    before: str


class Shown(BaseModel):
    """A picture on the page.

    Attributes:
        same: number of pictures with this caption, this one included.
    """

    number: int
    name: str
    source: str
    text: str
    written_by: str
    edited: bool
    same: int


class PageOfCaptions(BaseModel):
    """A page of the pictures that a filter lets through; `counts` has the pictures of every filter."""

    items: list[Shown]
    page: int
    pages: int
    counts: dict[Show, int]


class Review:
    """Captions of a run, shared by the requests of its page."""

    def __init__(self, config: Config) -> None:
        self.config, self.lock = config, threading.Lock()
        self._open()

    def _open(self) -> None:
        self.captions: Captions = open_captions(self.config)
        self.captions.require_editable()
        self.pictures = Pictures(self.config, self.captions)

    def refresh(self) -> None:
        """Read the captions again if their files have changed."""
        with self.lock:
            if not self.captions.is_current():
                self._open()

    def page(self, show: Show, find: str, page: int) -> PageOfCaptions:
        """Return a page of the pictures of a filter whose captions or names contain `find`."""
        items = self.captions.items
        keys = [_key(item.text) for item in items]
        times = Counter(keys)
        filters: dict[Show, list[int]] = {
            "all": list(range(len(items))),
            "empty": [number for number, key in enumerate(keys) if not key],
            "duplicate": [number for number, key in enumerate(keys) if key and times[key] > 1],
            "edited": [number for number, item in enumerate(items) if item.is_edited],
        }
        filters["duplicate"].sort(key=lambda number: (-times[keys[number]], keys[number], number))
        chosen, sought = filters[show], _key(find)
        if sought:
            chosen = [n for n in chosen if sought in keys[n] or sought in items[n].name.casefold()]
        pages = max(1, -(-len(chosen) // PAGE_ROWS))
        page = min(max(page, 0), pages - 1)
        shown = [
            Shown(
                number=number,
                name=items[number].name,
                source=self.captions.sources[items[number].source].name,
                text=items[number].text,
                written_by=items[number].written_by,
                edited=items[number].is_edited,
                same=times[keys[number]] if keys[number] else 1,
            )
            for number in chosen[page * PAGE_ROWS : (page + 1) * PAGE_ROWS]
        ]
        counts = {name: len(numbers) for name, numbers in filters.items()}
        return PageOfCaptions(items=shown, page=page, pages=pages, counts=counts)

    def save(self, number: int, edit: Edit) -> None:
        """Save a caption.

        Raises:
            ConfigError: the caption or its file was changed meanwhile, or the run is in use.
        """
        with self.lock:
            item = self.captions.items[number]
            if item.text != edit.before:
                raise ConfigError(f"this caption is now {item.text!r}; reload the page, and edit it again")
            self.captions.save(item, edit.text)


def _key(text: str) -> str:
    """Caption as it is compared with others: without regard to case and white space."""
    return " ".join(text.casefold().split())


def create_app(review: Review) -> FastAPI:
    """Create the page's application."""
    app = FastAPI(title="diffray: captions", openapi_url=None, docs_url=None, redoc_url=None)
    style = STYLE.read_text(encoding="utf-8") + (HERE / "page.css").read_text(encoding="utf-8")

    @app.middleware("http")
    async def guard(request: Request, answer: Next) -> Response:
        if problem := _refusal(request):
            return JSONResponse({"detail": problem}, 403)
        response = await answer(request)
        response.headers.update({k: v for k, v in HEADERS.items() if k not in response.headers})
        return response

    @app.get("/")
    def page() -> FileResponse:
        review.refresh()
        return FileResponse(HERE / "page.html")

    @app.get("/page.js")
    def script() -> FileResponse:
        return FileResponse(HERE / "page.js")

    @app.get("/page.css")
    def styles() -> Response:
        return Response(style, media_type="text/css")

    @app.get("/captions")
    def captions(show: Show = "all", find: str = "", page: int = 0) -> PageOfCaptions:
        return review.page(show, find, page)

    @app.get("/pictures/{number}")
    def picture(number: int, request: Request, whole: Annotated[bool, Query()] = False) -> Response:
        item = _item(review, number)
        tag = f'"{fingerprint(item.piece.digest, item.row, whole)}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag})
        data = review.pictures.jpeg(number, SIDES[whole])
        if data is None:
            raise HTTPException(404, f"{item.name}: the picture cannot be read")
        return Response(data, media_type="image/jpeg", headers={"ETag": tag})

    @app.put("/captions/{number}")
    def save(number: int, edit: Edit) -> dict[str, str]:
        _item(review, number)
        try:
            review.save(number, edit)
        except ConfigError as error:
            raise HTTPException(409, str(error)) from None
        return {"text": edit.text}

    return app


def _item(review: Review, number: int) -> Listed:
    items = review.captions.items
    if not 0 <= number < len(items):
        raise HTTPException(404, "no such picture; reload the page")
    return items[number]


def _refusal(request: Request) -> str | None:
    """Return why a request does not come from this page, or None."""
    host = request.headers.get("host", "")
    if urlsplit(f"//{host}").hostname not in NAMES:
        return f"this page is served as {' or '.join(NAMES)}, not as {host}"
    if request.method in ("GET", "HEAD"):
        return None
    origin, kind = request.headers.get("origin"), request.headers.get("content-type", "")
    if origin != f"http://{host}" or not kind.startswith("application/json"):
        return "captions are changed by this page only"
    return None


def serve(config: Config, port: int, announce: Callable[[str], None]) -> None:
    """Serve the page until an interrupt.

    Args:
        port: port on the loopback interface; 0: a free one.
        announce: function that is told the page's address.

    Raises:
        ConfigError: the captions cannot be edited, or the port is in use.
    """
    app = create_app(Review(config))
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise ConfigError(f"--port: {port}: {error.strerror}; give another one") from None
        announce(f"http://{HOST}:{listener.getsockname()[1]}/")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
        server.run(sockets=[listener])
