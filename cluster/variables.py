"""Environment variables that a job inherits from the user's shell, and how secrets reach a cluster.

Ray 2.60 writes a job's `env_vars` into the logs of every node ("Creating runtime env: ...") and shows them in
its Jobs API. So secrets travel in a small module of their own, of which Ray logs only the digest.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PLAIN = ("HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT")
"""Variables passed by Ray's `env_vars`, if the user has set them."""

SECRET = (
    "HF_TOKEN",
    "MLFLOW_TRACKING_URI",  # which may hold a password
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "DIFFRAY_KEY",  # of an endpoint, for `diffray update`
    "PGPASSWORD",  # of serve.feedback_url, likewise
)
"""Variables passed by the module, if the user has set them."""

MODULE = "diffray_variables"


def those_set(names: tuple[str, ...]) -> dict[str, str]:
    """Return those of the named variables that are set in this process."""
    return {name: os.environ[name] for name in names if os.environ.get(name)}


@contextmanager
def secret_modules() -> Iterator[list[str]]:
    """Yield the folders for Ray's `py_modules`: one with this process's secrets, or none; then delete it."""
    values = those_set(SECRET)
    if not values:
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="diffray-") as folder:
        module = Path(folder) / MODULE
        module.mkdir()
        (module / "__init__.py").write_text(f"VALUES = {json.dumps(values)}\n", encoding="utf-8")
        yield [str(module)]


def take() -> None:
    """Set the secrets that the job's user sent; do nothing outside a job."""
    try:
        from diffray_variables import VALUES  # type: ignore[import-not-found]
    except ImportError:
        return
    os.environ.update(VALUES)
