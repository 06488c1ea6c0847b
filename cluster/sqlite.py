"""The URL of a SQLite file, and the file of such a URL: `?` and `%` in a path are none of a URL's."""

from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError


def sqlite_url(file: str | Path) -> str:
    """The URL that SQLAlchemy, and with it MLflow, takes for a SQLite file.

    Only what SQLAlchemy 2.1 would read as its own is escaped: MLflow 3.17 makes a folder of its text, and
    so leaves an empty one beside a storage whose name has a `?` or `%`.
    """
    return f"sqlite:///{str(file).replace('%', '%25').replace('?', '%3F')}"


def sqlite_file(url: str) -> Path | None:
    """The file that a URL names; None for one of another kind, or for a database in memory."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the latter for a port that is no number
        return None
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database == ":memory:":
        return None
    return Path(parsed.database)
