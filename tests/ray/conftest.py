"""What the tests on Ray share beside the cluster."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import LocalCluster
from ray_jobs.data.feeding.dataset import Dataset
from tests.workers import Workers


@pytest.fixture(scope="session")
def two_workers(ray_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(2, tmp_path_factory.mktemp("two-workers"))
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def tiny_dataset(
    ray_cluster: LocalCluster,
    tiny_model: Path,
    picture_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Dataset:
    """The drawn pictures as `tiny_config` has them prepared, once for all: an encoder is slow to start."""
    from ray_jobs.data.preparation import prepare
    from tests.ray.test_training import tiny_config

    return prepare(tiny_config(tiny_model, picture_folder, tmp_path_factory.mktemp("tiny-dataset")))
