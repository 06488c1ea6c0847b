"""The page's application: each route is a few lines over the functions that the Python API has.

State is read from the records of runs and jobs, so a page that is closed, or served anew, loses nothing.
"""

import io
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

import serving
from diffray import jobs
from diffray.jobs import JobFailed
from diffray.runs import Run
from diffray.settings import config_of
from diffray.ui import checks, queue
from diffray.ui.access import DOCUMENT_HEADERS, Access
from diffray.ui.checks import Check, Kind
from diffray.ui.data_folders import MAX_BYTES, Folder
from diffray.ui.forms import Form, Recipe, all_recipes, arguments_of, place_of
from diffray.ui.page import Deployed, Page, found, missing
from diffray.ui.pairs import Given
from diffray.ui.runs import Detail, Rung, Summary, waiting_run
from ray_jobs.config import ConfigError
from ray_jobs.config.fields import RunName
from ray_jobs.registry.models import CHAMPION, entries, tracking_uri
from ray_jobs.registry.store import check_answers
from ray_jobs.report.dataset_page import STYLE
from ray_jobs.run.folder import REPORT
from serving.client import EndpointError

WEB = Path(__file__).parent / "web"
SHARED = Path(serving.__file__).parent / "web"  # the drawing page's


class Options(BaseModel):
    """What the form offers."""

    folders: list[str]
    recipes: list[Recipe]
    at_once: int


class Version(BaseModel):
    """The registered version of a run, and the one that is served."""

    model: str
    version: int | None
    champion: int | None
    decision: str | None


class Session(BaseModel):
    """A key, for a cookie."""

    key: str = Field(max_length=200)


class Upload(BaseModel):
    """A folder into which all pictures were sent."""

    folder: str


class Prompt(BaseModel):
    """A picture to draw."""

    prompt: str = Field(min_length=1, max_length=2000)
    seed: int | None = Field(None, ge=0, lt=2**31)


def create_app(page: Page, access: Access) -> FastAPI:
    """Create the page's application."""
    app = FastAPI(title="diffray: train", openapi_url=None, docs_url=None, redoc_url=None)
    app.middleware("http")(access)
    for kind in (ConfigError, EndpointError, JobFailed, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer_error)
    _add_files(app, access)
    _add_form(app, page)
    _add_runs(app, page)
    _add_models(app, page)
    return app


def _add_files(app: FastAPI, access: Access) -> None:
    """Add the page's own files; the look is the drawing page's, with the report's charts and tables."""
    style = "".join(
        each.read_text(encoding="utf-8") for each in (STYLE, SHARED / "style.css", WEB / "style.css")
    )
    index = (WEB / "index.html").read_text(encoding="utf-8")
    app.mount("/web", StaticFiles(directory=WEB))

    @app.get("/")
    def page() -> Response:
        return Response(index, media_type="text/html")

    @app.get("/style.css")
    def styles() -> Response:
        return Response(style, media_type="text/css")

    @app.get("/icon.svg")
    def icon() -> Response:
        return Response((SHARED / "icon.svg").read_bytes(), media_type="image/svg+xml")

    @app.post("/session")
    def session(given: Session) -> Response:
        return access.open_session(given.key.strip())


def _add_form(app: FastAPI, page: Page) -> None:
    """Add what leads to a run: pictures, dry run and plan."""
    folders = page.folders

    @app.get("/options")
    def options() -> Options:
        return Options(folders=folders.names, recipes=all_recipes(), at_once=page.queue.at_once)

    @app.get("/folders")
    def folder(path: str) -> Folder:
        return folders.show(path)

    @app.put("/uploads")
    async def upload(folder: str, name: str, request: Request) -> dict[str, str]:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > MAX_BYTES:
                raise HTTPException(413, f"{name}: larger than {MAX_BYTES >> 20} MiB")
        return {"name": await run_in_threadpool(folders.save, folder, name, bytes(content))}

    @app.post("/uploads/finish")
    def finish(given: Upload) -> Folder:
        folders.finish(given.folder)
        return folders.show(given.folder)

    @app.post("/checks/{kind}")
    def check(kind: Kind, form: Form, again: bool = False) -> Check:
        arguments = arguments_of(form, folders)
        speed = form.images_per_second or page.runs.speed(config_of(arguments)) if kind == "plan" else None
        options = ["--images-per-second", f"{speed:g}"] if speed else []
        return checks.begin_check(kind, arguments, form.address, options, again=again)

    @app.get("/checks/{kind}/{name}")
    def checked(kind: Kind, name: RunName) -> Check:
        return checks.state(kind, name)

    @app.post("/checks/{kind}/{name}/stop")
    def stop_check(kind: Kind, name: RunName) -> Check:
        return checks.stop(kind, name)

    @app.get("/checks/preview/{name}/page")
    def preview(name: RunName) -> Response:
        return Response(checks.preview_page(name), media_type="text/html", headers=DOCUMENT_HEADERS)


def _add_runs(app: FastAPI, page: Page) -> None:
    """Add runs: to start, watch, stop and delete."""
    runs = page.runs

    @app.get("/runs")
    def all_runs() -> list[Summary]:
        return runs.all()

    @app.post("/runs")
    def start(form: Form) -> dict[str, str]:
        return {"name": page.start(form)}

    @app.get("/runs/{name}")
    def detail(name: RunName, seen: str = "") -> Detail | Summary:
        if not (run := waiting_run(name) or runs.detail(name, seen)):
            raise missing(name)
        return run

    @app.delete("/runs/{name}")
    def delete(name: RunName) -> None:
        if queue.read(name) is None:
            found(name)
        page.delete(name)

    @app.post("/runs/{name}/stop")
    def stop(name: RunName) -> None:
        page.queue.remove(name)
        if name in jobs.names():
            Run(name).stop()

    @app.post("/runs/{name}/resume")
    def resume(name: RunName) -> None:
        page.resume(name)

    @app.get("/runs/{name}/report")
    def report(name: RunName) -> Response:
        run = found(name)
        run.report()
        return Response(run.folder.root.read_text(REPORT), media_type="text/html", headers=DOCUMENT_HEADERS)

    @app.get("/runs/{name}/rungs")
    def rungs(name: RunName, trial: str) -> list[Rung]:
        return runs.rungs(found(name).name, trial)

    @app.get("/runs/{name}/picture")
    def picture(
        name: RunName, trial: str, step: int, kind: str, file: str, small: Annotated[bool, Query()] = False
    ) -> Response:
        return _picture(name, runs.picture(found(name).name, trial, step, kind, file, small=small), small)

    @app.get("/runs/{name}/given")
    def given(name: RunName) -> Given:
        return runs.given(found(name).name)

    @app.get("/runs/{name}/given/picture")
    def given_picture(
        name: RunName, number: int, which: str, small: Annotated[bool, Query()] = False
    ) -> Response:
        return _picture(name, runs.given_picture(found(name).name, number, which, small=small), small)


def _picture(run: str, content: bytes | None, small: bool) -> Response:
    """Answer with a picture of a rung or of the data, which does not change.

    Raises:
        HTTPException: 404, there is none.
    """
    if content is None:
        raise HTTPException(404, f"{run}: no such picture")
    headers = {"Cache-Control": "private, max-age=86400"}
    return Response(content, media_type="image/jpeg" if small else "image/png", headers=headers)


def _add_models(app: FastAPI, page: Page) -> None:
    """Add what is made of a run: its version, its endpoint, and pictures of that."""

    @app.get("/runs/{name}/version")
    def version(name: RunName) -> Version:
        run = found(name)
        model, winner = run.config.publish.model_name, run.winner
        check_answers(tracking_uri(run.config))
        entry = entries(run.config, [model]).get(model)
        return Version(
            model=model,
            version=winner and winner.registry_version,
            champion=entry.aliases.get(CHAMPION) if entry else None,
            decision=winner and winner.registry_decision,
        )

    @app.post("/runs/{name}/promote")
    def promote(name: RunName) -> None:
        found(name).promote()

    @app.post("/runs/{name}/deploy")
    def deploy(name: RunName) -> None:
        page.deploy(name)

    @app.get("/runs/{name}/endpoint")
    def endpoint(name: RunName) -> Deployed:
        return page.endpoint(name)

    @app.delete("/runs/{name}/endpoint")
    def undeploy(name: RunName) -> None:
        page.undeploy(name)

    @app.post("/runs/{name}/draw")
    def draw(name: RunName, asked: Prompt) -> Response:
        endpoint = found(name).endpoint
        if endpoint is None:
            raise ConfigError(f"{name}: its endpoint does not run; deploy it first")
        [picture] = endpoint.draw(asked.prompt, seed=asked.seed)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")


async def _answer_error(request: Request, error: Exception) -> Response:
    """Answer with one line for the person, and the input that it is about."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = str(first["loc"][-1])
        return JSONResponse({"detail": f"{place}: {first['msg']}", "field": place}, 422)
    if isinstance(error, HTTPException):
        return JSONResponse({"detail": error.detail, "field": None}, error.status_code)
    return JSONResponse({"detail": str(error), "field": place_of(str(error))}, 409)
