"""What the page's routes do with runs and endpoints beyond one call of the API."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

from fastapi import HTTPException
from pydantic import BaseModel

from diffray import api, jobs
from diffray.endpoints import Endpoint
from diffray.runs import Run
from diffray.ui import checks, queue
from diffray.ui.data_folders import DataFolders
from diffray.ui.forms import Form, arguments_of
from diffray.ui.queue import Queue
from diffray.ui.runs import Runs
from ray_jobs.config import ConfigError
from ray_jobs.config.fields import nearest
from serving.client import EndpointError, call


class Deployed(BaseModel):
    """Endpoint of a run: off, starting, ready or failed.

    Attributes:
        line: the last line that it printed, or why it failed.
    """

    state: Literal["off", "starting", "ready", "failed"]
    url: str = ""
    line: str = ""


class Page:
    """What the routes share. What a page before it has left unfinished, uploads and dry runs, is deleted.

    Args:
        waiting: queue of this folder, which no other page has.
    """

    def __init__(self, folders: DataFolders, waiting: Queue) -> None:
        self.folders, self.queue, self.runs = folders, waiting, Runs()
        folders.delete_unfinished()
        checks.delete_unfinished()
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="deploy")
        self._deploying: dict[str, Future[Endpoint]] = {}

    def start(self, form: Form) -> str:
        """Start a run on a cluster, or let it wait for room on this machine; return its name."""
        return self._begin(arguments_of(form, self.folders), form.address)

    def _begin(self, arguments: list[str], address: str | None) -> str:
        run = api.begin(arguments, address) if address else self.queue.add(arguments)
        self.runs.forget(run.name)
        return run.name

    def resume(self, name: str) -> None:
        """Start a run that has ended again, or one that could not be started."""
        if asked := queue.read(name):
            if not asked.arguments:
                raise ConfigError(asked.problem)
            self._begin(asked.arguments, None)
        else:
            record = found(name).job.started
            self._begin(record.arguments, record.address)

    def delete(self, name: str) -> None:
        """Delete a run with its folder; of one that never started, its place among those that wait."""
        started = Run(name) if name in jobs.names() else None
        if started:
            started.require_unneeded()  # before it loses its place among those that wait
        checks.stop_checks(name)
        self.queue.remove(name)
        if started:
            started.delete()
        self.runs.forget(name)

    def deploy(self, name: str) -> None:
        """Start the endpoint of a run, on a free port of this machine or as the run says on a cluster."""
        run = found(name)
        port = {} if run.job.started.address else {"serve.port": 0}
        if name not in self._deploying or self._deploying[name].done():
            self._deploying[name] = self._pool.submit(run.deploy, **port)

    def endpoint(self, name: str) -> Deployed:
        """Return the state of a run's endpoint."""
        run, starting = found(name), self._deploying.get(name)
        if starting and starting.done() and (error := starting.exception()):
            return Deployed(state="failed", line=str(error))
        if not (endpoint := run.endpoint):
            return Deployed(state="starting" if starting and not starting.done() else "off")
        try:
            call(f"{endpoint.url}/readyz", timeout_s=2)
        except EndpointError:
            return Deployed(state="starting", line=endpoint.job.last_line())
        return Deployed(state="ready", url=endpoint.url)

    def undeploy(self, name: str) -> None:
        """Stop the endpoint of a run."""
        if endpoint := found(name).endpoint:
            endpoint.delete()
        self._deploying.pop(name, None)


def found(name: str) -> Run:
    """Return a run that was started.

    Raises:
        HTTPException: 404, there is none of that name.
    """
    if name not in jobs.names():
        raise missing(name)
    return Run(name)


def missing(name: str) -> HTTPException:
    """Return the error that there is no run of a name."""
    fix = nearest(name, jobs.names(), "the list has all")
    return HTTPException(404, f"{name}: no run of this name; {fix}")
