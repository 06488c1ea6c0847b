"""Convert between SQLite files and their URLs: `?` and `%` in paths, and paths relative to `home()`."""

from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from ray_jobs.config import home


def sqlite_url(file: str | Path) -> str:
    """Return the URL of a SQLite file for SQLAlchemy, and thus for MLflow.

    Only characters with a meaning in SQLAlchemy 2.1's URLs are escaped. MLflow 3.17 creates a folder from the
    URL's text, and so leaves an empty one beside a storage whose name has a `?` or `%`.
    """
    return f"sqlite:///{str(file).replace('%', '%25').replace('?', '%3F')}"


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL; None for other databases and for one in memory."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the latter for a port that is not a number
        return None
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database == ":memory:":
        return None
    return Path(parsed.database)


def from_home(url: str) -> str:
    """Return a database's URL; a SQLite file with a relative path lies under `home()`.

    SQLAlchemy takes the current folder instead, which in a job on the embedded Ray is a copy of the checkout
    that is deleted after the job. SQLite's own `file:` URIs stay as they are.
    """
    file = sqlite_file(url)
    if file is None or file.is_absolute() or str(file).startswith("file:"):
        return url
    address, mark, query = url.partition("?")
    driver, place = address.partition(":")[0], sqlite_url(home() / file.expanduser())
    return f"{driver}{place.removeprefix('sqlite')}{mark}{query}"
