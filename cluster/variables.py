"""The variables of a user's shell that a job gets, and the way on which secrets reach a cluster.

Ray 2.60 writes a job's `env_vars` into the logs of every node ("Creating runtime env: ...") and shows them in
its Jobs API. So what is secret goes as a small module of its own, which Ray logs by its digest only.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PLAIN = ("HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT")
"""What the job gets by Ray's `env_vars`, if the user has set it."""

SECRET = (
    "HF_TOKEN",
    "MLFLOW_TRACKING_URI",  # which may hold a password
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
"""What it gets by the module, if the user has set it."""

MODULE = "diffray_variables"


def those_set(names: tuple[str, ...]) -> dict[str, str]:
    """The variables of these names that this process has."""
    return {name: os.environ[name] for name in names if os.environ.get(name)}


@contextmanager
def secret_modules() -> Iterator[list[str]]:
    """Folders for Ray's `py_modules`: one with the secrets of this process, or none. Gone after the block."""
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
    """Set what the job's user sent, in a process of a job; elsewhere nothing."""
    try:
        from diffray_variables import VALUES  # type: ignore[import-not-found]
    except ImportError:
        return
    os.environ.update(VALUES)
