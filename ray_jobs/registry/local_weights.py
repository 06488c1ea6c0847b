"""Provide the weights of registered versions on this machine, verified against the registration."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.storage import Storage
from ray_jobs.config import ConfigError
from ray_jobs.registry.models import RegisteredModel, verify_weights


@contextmanager
def local_weights(version: RegisteredModel) -> Iterator[Path]:
    """Provide the local folder of a version's weights; a downloaded copy is deleted afterwards.

    A remote folder is downloaded once, so the files that are verified are the ones that are loaded.

    Raises:
        ConfigError: the weights cannot be read, or differ from the registered ones.
    """
    storage = Storage.open(version.source)
    try:
        folder = storage.local_copy()
    except OSError as error:
        raise ConfigError(
            f"{version.source}: the weights of version {version.version} of {version.name!r} cannot be read: "
            f"{error}"
        ) from error
    try:
        verify_weights(version, str(folder))
        yield folder
    finally:
        if not storage.is_local:
            shutil.rmtree(folder.parent)
