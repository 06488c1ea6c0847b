"""Dry run and plan of a run that is not started: `diffray prepare --dry-run` and `diffray plan`, as jobs.

They take seconds to minutes, and their records lie beside the run's, in `.diffray/<run>/<kind>/`: a page that
is opened again finds them, and the same question is not computed twice.
"""

import logging
from contextlib import suppress
from typing import Literal, NamedTuple

from pydantic import BaseModel

from cluster.lease import LEASES, holder
from diffray import jobs
from diffray.api import startable
from diffray.jobs import JOB, Job, Status
from diffray.settings import config_of
from diffray.ui import queue
from ray_jobs.config import ConfigError, home
from ray_jobs.data.preparation import PREVIEW
from ray_jobs.run.folder import DATASET, RunFolder
from ray_jobs.run.manifest import MANIFEST

Kind = Literal["preview", "plan"]
MADE = "made"  # beside the record of a dry run that began where the run had no folder
LOG = 32_768  # bytes of a check's output that the page shows


class Command(NamedTuple):
    """Module of a check and its own arguments."""

    module: str
    options: tuple[str, ...] = ()


COMMANDS: dict[Kind, Command] = {
    "preview": Command("ray_jobs.prepare", ("--dry-run",)),
    "plan": Command("cluster.plan"),
}


class Check(BaseModel):
    """State of a check.

    Attributes:
        log: what it has printed.
        page: whether there is a page of the dry run.
    """

    name: str
    kind: Kind
    status: Status
    log: str
    page: bool


def begin_check(
    kind: Kind, arguments: list[str], address: str | None, options: list[str], *, again: bool
) -> Check:
    """Start a check, or return the one of these arguments.

    Args:
        arguments: arguments of the run's stage, `--config` first.
        address: Jobs API of the cluster that reads the pictures; a plan is computed here.
        options: further arguments of the check.
        again: start it anew, for pictures that have changed.

    Raises:
        ConfigError: a setting is wrong, the name belongs to another run, or the cluster is not reached.
    """
    run, command = startable(arguments, address), COMMANDS[kind]
    if kind == "preview" and run.job.record and run.status == "running":
        raise ConfigError(f"name: {run.name}: it is running already; look at its log and report")
    job, whole = _job_of(kind, run.name), [*arguments, *options, *command.options]
    there = address if kind == "preview" else None
    if former := job.record:
        same = (former.arguments, former.address) == (whole, there)
        if same and (job.status == "running" or (job.status == "finished" and not again)):
            return state(kind, run.name)
        job.stop()
    if kind == "preview" and not RunFolder.of(config_of(arguments)).root.exists():
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / MADE).touch()
    job.start(command.module, whole, there, submit=False)
    return state(kind, run.name)


def state(kind: Kind, name: str) -> Check:
    """Return the state of a check.

    Raises:
        ConfigError: there is none of that run.
    """
    job = _job(kind, name)
    log = "\n".join(line for line in job.log(LOG).splitlines() if not line.startswith("framework logs:"))
    status = job.status
    return Check(
        name=name, kind=kind, status=status, log=log, page=kind == "preview" and status == "finished"
    )


def stop(kind: Kind, name: str) -> Check:
    """Stop a check, and return its state. Of a dry run nothing is left but its log."""
    _job(kind, name).stop()
    if kind == "preview":
        _delete_folder(name)
    return state(kind, name)


def preview_page(name: str) -> str:
    """Return the page of a dry run."""
    arguments = _job("preview", name).started.arguments
    return RunFolder.of(config_of(arguments[: -len(COMMANDS["preview"].options)])).dataset.read_text(PREVIEW)


def delete_unfinished() -> None:
    """Delete records of this machine's checks that failed or were interrupted, and what these have made."""
    for kind in COMMANDS:
        for file in (home() / jobs.RECORDS).glob(f"*/{kind}/{JOB}"):
            name = file.parent.parent.name
            job = _job_of(kind, name)
            try:
                if job.started.address is None and job.status in ("failed", "stopped"):
                    if kind == "preview":
                        _delete_folder(name)
                    job.forget()
                    with suppress(OSError):  # the run has other records
                        job.folder.parent.rmdir()
            except (ConfigError, OSError) as error:  # its recipe is gone, or its storage is not reached
                logging.warning("%s: kept: %s", job.folder, error)


def _delete_folder(name: str) -> None:
    """Delete the run's folder if the dry run has made it and nothing else has begun there."""
    job = _job_of("preview", name)
    if not (job.folder / MADE).exists() or Job(name).record or queue.read(name):
        return
    run = RunFolder.of(config_of(job.started.arguments[: -len(COMMANDS["preview"].options)]))
    begun = {*run.root.files(), *run.root.folders()} - {DATASET, LEASES}
    if not (begun or run.dataset.exists(MANIFEST) or holder(run.root)):
        run.root.delete("")
    (job.folder / MADE).unlink()


def stop_checks(name: str) -> None:
    """Stop what runs of a run's checks."""
    for kind in COMMANDS:
        if (job := _job_of(kind, name)).record:
            job.stop()


def _job_of(kind: Kind, name: str) -> Job:
    return Job(f"{name}/{kind}")


def _job(kind: Kind, name: str) -> Job:
    known = {path.parent.parent.name for path in (home() / jobs.RECORDS).glob(f"*/{kind}/{JOB}")}
    if name not in known:
        raise ConfigError(f"{name}: no {kind} of this run; ask for it first")
    return _job_of(kind, name)
