"""Dry run and plan of a run that is not started: `diffray prepare --dry-run` and `diffray plan`, as jobs.

They take seconds to minutes, and their records lie beside the run's, in `.diffray/<run>/<kind>/`: a page that
is opened again finds them, and the same question is not computed twice.
"""

from typing import Literal, NamedTuple

from pydantic import BaseModel

from diffray import jobs
from diffray.api import startable
from diffray.jobs import Job, Status
from diffray.settings import config_of
from ray_jobs.config import ConfigError, home
from ray_jobs.data.preparation import PREVIEW
from ray_jobs.run.folder import RunFolder

Kind = Literal["preview", "plan"]
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
    job, whole = Job(f"{run.name}/{kind}"), [*arguments, *options, *command.options]
    there = address if kind == "preview" else None
    if former := job.record:
        same = (former.arguments, former.address) == (whole, there)
        if same and (job.status == "running" or (job.status == "finished" and not again)):
            return state(kind, run.name)
        job.stop()
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
    """Stop a check, and return its state."""
    _job(kind, name).stop()
    return state(kind, name)


def preview_page(name: str) -> str:
    """Return the page of a dry run."""
    arguments = _job("preview", name).started.arguments
    return RunFolder.of(config_of(arguments[: -len(COMMANDS["preview"].options)])).dataset.read_text(PREVIEW)


def stop_checks(name: str) -> None:
    """Stop what runs of a run's checks."""
    for kind in COMMANDS:
        if (job := Job(f"{name}/{kind}")).record:
            job.stop()


def _job(kind: Kind, name: str) -> Job:
    known = {path.parent.parent.name for path in (home() / jobs.RECORDS).glob(f"*/{kind}/job.json")}
    if name not in known:
        raise ConfigError(f"{name}: no {kind} of this run; ask for it first")
    return Job(f"{name}/{kind}")
