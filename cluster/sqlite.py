"""Convert between SQLite files and their URLs, escaping `?` and `%` in paths."""

from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError


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
