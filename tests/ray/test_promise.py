"""What a driver promises to others while it works on it."""

import time
from pathlib import Path

import pytest
import ray

from cluster.local import LocalCluster
from cluster.promise import Promise, promised


@ray.remote(num_cpus=0)
def value_of(promise: "Promise[list[int]]") -> tuple[list[int], bool]:
    """The value, and whether a second question has the same object."""
    value = promise.wait()
    return value, promise.wait() is value


def test_a_promise_is_kept_in_every_process(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    value = [1, 2, 3]

    def work() -> list[int]:
        while not (tmp_path / "asked").exists():
            time.sleep(0.01)
        return value

    with promised(work) as promise:
        asked = [value_of.remote(promise) for _ in range(2)]
        (tmp_path / "asked").touch()
        assert ray.get(asked) == [(value, True)] * 2
        assert promise.wait() is value and not promise.has_failed


def test_work_that_fails_fails_all_who_wait(ray_cluster: LocalCluster) -> None:
    def work() -> list[int]:
        raise FileNotFoundError("no such picture")

    with promised(work) as promise:
        asked = value_of.remote(promise)
        with pytest.raises(FileNotFoundError, match="no such picture"):
            promise.wait()
        assert promise.has_failed
        with pytest.raises(RuntimeError, match="FileNotFoundError: no such picture"):
            ray.get(asked)
