"""What Ray does with the GPUs of a machine, which are pretended here: who sees them."""

from pathlib import Path

import pytest

from tests.pretended_gpus import run_on_gpus

pytestmark = pytest.mark.ray

VISIBLE = """
import os
see = lambda: os.environ.get("CUDA_VISIBLE_DEVICES")
print(int(ray.cluster_resources()["GPU"]))
print(repr(ray.get(ray.remote(num_cpus=1)(see).remote())))
print(repr(ray.get(ray.remote(num_cpus=1, num_gpus=1)(see).remote())))
"""


def test_a_task_that_reserves_no_gpu_sees_none(tmp_path: Path) -> None:
    assert run_on_gpus(VISIBLE, 1, tmp_path) == ["1", "''", "'0'"]
