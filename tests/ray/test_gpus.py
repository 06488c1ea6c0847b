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


SHARED = """
import ray.train
from ray.train.data_parallel_trainer import DataParallelTrainer
from ray_jobs.config import EvaluateConfig, TrainConfig
from ray_jobs.evaluation.pool import resources
from ray_jobs.training.trainer import worker_group

class Evaluator:
    def gpus(self):
        return ray.get_gpu_ids()

def work():
    ray.train.report({"gpus": ray.get_gpu_ids()})

actor = ray.remote(**resources(EvaluateConfig(use_gpu=True, gpu_share=0.3)))(Evaluator)
evaluators = [actor.remote() for _ in range(NUM_EVALUATORS)]
print(ray.get([each.gpus.remote() for each in evaluators]), flush=True)
train = TrainConfig(use_gpu=True, gpu_share=0.7, num_workers=1)
run = ray.train.RunConfig(name="shared", storage_path=FOLDER)
print(DataParallelTrainer(work, scaling_config=worker_group(train), run_config=run).fit().metrics["gpus"])
"""


@pytest.mark.parametrize(
    ("count", "evaluators", "seen"), [(1, 1, ["[[0]]", "[0]"]), (2, 2, ["[[0], [0]]", "[1]"])]
)
def test_a_worker_and_evaluators_share_gpus(
    count: int, evaluators: int, seen: list[str], tmp_path: Path
) -> None:
    """Beside a worker of 0.7 is room for one evaluator of 0.3. Ray puts two evaluators on the first GPU, as
    `cluster.shape.place` assumes."""
    lines = SHARED.replace("NUM_EVALUATORS", str(evaluators)).replace("FOLDER", repr(str(tmp_path / "runs")))
    assert run_on_gpus(lines, count, tmp_path)[-2:] == seen


PREFLIGHT = """
from cluster.nodes import living_nodes
from cluster.preflight import check_gpus
from ray_jobs.config import ConfigError, load_config

gpus, cpus = (["train.use_gpu=" + use] for use in ("true", "false"))
check_gpus(load_config("configs/demo.yaml", cpus), living_nodes(), "train")
try:
    check_gpus(load_config("configs/demo.yaml", gpus), living_nodes(), "train")
except ConfigError as error:
    print(error)
print(ray.get(ray.remote(num_gpus=1)(lambda: "free").remote()))
"""


def test_a_node_whose_gpus_pytorch_cannot_use_is_told_before_anything_reserves_them(tmp_path: Path) -> None:
    *_, error, free = run_on_gpus(PREFLIGHT, 1, tmp_path)
    assert error.startswith("use_gpu: ") and "127.0.0.1" in error and "PyTorch" in error
    assert free == "free"
