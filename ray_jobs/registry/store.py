"""Access to the MLflow store: filters by name, paged searches, experiments, and retried writes.

Independent of configurations and versions, which belong to `ray_jobs/registry/models.py`.
"""

import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from cluster.sqlite import sqlite_file
from ray_jobs.config import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

ANSWERS_WITHIN = 10  # seconds; timeout of the server check before a run starts
ATTEMPTS = 10  # per write
PAUSE_S = 0.05  # maximum pause before the second attempt; doubled before each further one
LONGEST_PAUSE_S = 5.0
# Errors of SQLite, PostgreSQL and MySQL when two programs write at once. MLflow 3.17 checks for a row, then
# inserts it, so the second of two writers fails. MLflow passes on the text without an error code of its own.
COLLISION = re.compile(
    "UNIQUE constraint failed|database is locked|duplicate key value|deadlock|could not serialize|"
    "Duplicate entry|Lock wait timeout",
    re.IGNORECASE,
)


T = TypeVar("T")


def retried(write: Callable[[], T]) -> T:
    """Execute a write, retrying after a short random pause if it collides with another program's.

    Raises:
        MlflowException: the write failed for another reason, or every attempt failed.
    """
    from mlflow.exceptions import MlflowException

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return write()
        except MlflowException as error:
            passes = error.error_code == "TEMPORARILY_UNAVAILABLE" or COLLISION.search(str(error))
            if attempt == ATTEMPTS or not passes:
                raise
        time.sleep(random.uniform(0, min(PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S)))
    raise AssertionError("the last attempt returns or raises")


def pages(search: Callable[..., Any], **options: Any) -> Iterator[Any]:
    """Yield the results of all pages of an MLflow search, which returns one page per call."""
    token = None
    while True:
        page = search(page_token=token, **options)
        yield from page
        token = page.token
        if not token:
            return


def versions_of(client: "MlflowClient", name: str) -> list["ModelVersion"]:
    """Return MLflow's versions of one registered model; its name may contain any characters."""
    # Filters have no escapes: quote the name with a mark that it does not contain, else compare it here.
    quote = next((each for each in "'\"" if each not in name), None)
    only = f"name = {quote}{name}{quote}" if quote else None
    found = pages(client.search_model_versions, filter_string=only)
    return [each for each in found if each.name == name]


def deleted_experiment(name: str, identity: str) -> ConfigError:
    """ConfigError for a deleted MLflow experiment, which accepts no entries but still occupies its name."""
    return ConfigError(
        f"name: the MLflow experiment {name!r} was deleted; bring it back (mlflow experiments restore "
        f"--experiment-id {identity}), remove it for good (mlflow gc --experiment-ids {identity}), or give "
        "this run another name"
    )


def experiment_id(
    client: "MlflowClient", name: str, *, artifacts: str | None = None, restore: bool = False
) -> str:
    """Return the ID of the experiment that holds a run's entries, creating it on first use.

    Args:
        artifacts: artifact URI of a new experiment; None: MLflow's default.
        restore: restore a deleted experiment.

    Raises:
        ConfigError: the experiment was deleted and `restore` is False.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        return _created(client, name, artifacts)
    if found.lifecycle_stage != "active":
        if not restore:
            raise deleted_experiment(name, found.experiment_id)
        retried(lambda: client.restore_experiment(found.experiment_id))
    return str(found.experiment_id)


def _created(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(retried(lambda: client.create_experiment(name, artifact_location=artifacts)))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.get_experiment_by_name(name).experiment_id)  # created meanwhile by another run


def is_server(uri: str) -> bool:
    """Return whether a store is an MLflow server, and not a database that MLflow's client opens itself."""
    return urlsplit(uri).scheme in ("http", "https")


def check_experiment(uri: str, name: str) -> None:
    """Check that a store is reachable and accepts a run's entries.

    This does not use MLflow, whose import takes seconds.

    Raises:
        ConfigError: no server or database answers, or the experiment was deleted.
    """
    if is_server(uri):
        _ask_server(uri, name)
    elif urlsplit(uri).scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql"):
        _ask_database(uri, name)


def check_answers(uri: str) -> None:
    """Check that an MLflow server answers, which MLflow's own client tries to find out for minutes.

    Raises:
        ConfigError: it does not.
    """
    if is_server(uri):
        _experiment_of(uri, "Default")


def _ask_server(uri: str, name: str) -> None:
    found = _experiment_of(uri, name)
    if found and found.get("lifecycle_stage") == "deleted":
        raise deleted_experiment(name, found["experiment_id"])


def _experiment_of(uri: str, name: str) -> dict[str, str] | None:
    """Return what a server tells of an experiment; None if there is none, or the server requires a login."""
    import requests

    place = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name"
    try:
        # A redirect leads to a login page, which MLflow's own client handles.
        answer = requests.get(
            place, params={"experiment_name": name}, timeout=ANSWERS_WITHIN, allow_redirects=False
        )
    except requests.exceptions.SSLError:
        return None  # it answers; MLflow's client validates the certificate
    except requests.RequestException as error:
        raise ConfigError(
            f"publish.tracking_uri: {without_password(uri)}: no MLflow server answers "
            f"({type(error).__name__}); start it, or correct the address here or in MLFLOW_TRACKING_URI"
        ) from None
    if answer.status_code != 200:
        return None
    try:
        return dict(answer.json()["experiment"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"publish.tracking_uri: {without_password(uri)}: what answers there is no MLflow server; "
            "correct the address here or in MLFLOW_TRACKING_URI"
        ) from None


def _ask_database(uri: str, name: str) -> None:
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.exc import SQLAlchemyError

    file = sqlite_file(uri)
    if file and not file.exists():
        return  # created on first use
    try:
        engine = create_engine(uri)
        try:
            with engine.connect() as connection:
                if not inspect(connection).has_table("experiments"):
                    return
                asked = text("SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = :name")
                found = connection.execute(asked, {"name": name}).first()
        finally:
            engine.dispose()
    except (SQLAlchemyError, ImportError) as error:
        raise ConfigError(
            f"publish.tracking_uri: {without_password(uri)}: {str(error).splitlines()[0]}"
        ) from None
    if found and found.lifecycle_stage == "deleted":
        raise deleted_experiment(name, str(found.experiment_id))


def without_password(uri: str) -> str:
    """Return a database's or server's URI without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(uri).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):  # another URI format, or a port that is not a number
        return re.sub("//[^/@]*@", "//***@", uri)
