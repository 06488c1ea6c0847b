"""Weights of registered versions on this machine, checked to be those that were registered."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.storage import Storage
from ray_jobs.config import ConfigError
from ray_jobs.registry.models import RegisteredModel, verify_weights


@contextmanager
def local_weights(version: RegisteredModel) -> Iterator[Path]:
    """The folder of a version's weights; what was fetched for it is deleted afterwards.

    What is checked is what is loaded: a remote folder is fetched once.

    Raises:
        ConfigError: the weights are gone, or not those that were registered.
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
