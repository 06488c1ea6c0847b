"""What the tests on Ray share beside the cluster."""

from collections.abc import Iterator

import pytest

from cluster.local import LocalCluster
from tests.workers import Workers


@pytest.fixture(scope="session")
def two_workers(ray_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(2, tmp_path_factory.mktemp("two-workers"))
    yield workers
    workers.stop()
