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
from pathlib import Path
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray_jobs.config import EvaluateConfig, TrainConfig
from ray_jobs.evaluation.pool import resources
from ray_jobs.training.trainer import worker_group

class Evaluator:
    def gpus(self):
        return ray.get_gpu_ids()

def work():
    Path(FOLDER, "seen").write_text(str(ray.get_gpu_ids()))

actor = ray.remote(**resources(EvaluateConfig(use_gpu=True, gpu_share=0.3)))(Evaluator)
evaluators = [actor.remote() for _ in range(NUM_EVALUATORS)]
print(ray.get([each.gpus.remote() for each in evaluators]), flush=True)
train = TrainConfig(use_gpu=True, gpu_share=0.7, num_workers=1)
run = ray.train.RunConfig(name="shared", storage_path=FOLDER)
DataParallelTrainer(work, scaling_config=worker_group(train), run_config=run).fit()
print(Path(FOLDER, "seen").read_text())
"""


@pytest.mark.parametrize(
    ("count", "evaluators", "seen"),
    [
        pytest.param(1, 1, ["[['0']]", "['0']"], marks=pytest.mark.journeys),  # part of the other
        (2, 2, ["[['0'], ['0']]", "['1']"]),
    ],
)
def test_a_worker_and_evaluators_share_gpus(
    count: int, evaluators: int, seen: list[str], tmp_path: Path
) -> None:
    """Beside a worker of 0.7 is room for one evaluator of 0.3. Ray puts two evaluators on the first GPU, as
    `cluster.shape.place` assumes."""
    lines = SHARED.replace("NUM_EVALUATORS", str(evaluators)).replace("FOLDER", repr(str(tmp_path)))
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


PRETRAIN = """
from pathlib import Path
from ray_jobs.config import ConfigError, load_config
from ray_jobs.pretrain import _train_on_worker

config = load_config("configs/pretrain_emoji.yaml", ["train.use_gpu=true", "pretrain.pictures=nowhere"])
try:
    _train_on_worker(config, config.pretrain, Path("unused"))
except ConfigError as error:
    print(error)
"""


def test_an_autoencoder_is_trained_where_a_gpu_is_and_its_errors_are_one_line(tmp_path: Path) -> None:
    [error] = run_on_gpus(PRETRAIN, 1, tmp_path)
    assert "nowhere" in error and "Traceback" not in error


ELASTIC = """
from pathlib import Path
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from cluster.nodes import living_nodes
from cluster.watch import watched
from ray_jobs.config import load_config
from ray_jobs.evaluation.pool import resources
from ray_jobs.training.trainer import worker_group

settings = ["train.use_gpu=true", "train.num_workers=[1, 4]", "search.max_concurrent_trials=1"]
settings += ["evaluate.use_gpu=true", "evaluate.num_actors=1", "data.encode=stream"]
config = load_config("configs/demo.yaml", settings)

class Evaluator:
    def gpus(self):
        return ray.get_gpu_ids()

class Encode:
    def __call__(self, batch):
        return batch

def work():
    context = ray.train.get_context()
    if context.get_world_rank() == 0:
        actors = {"compute": ray.data.ActorPoolStrategy(size=1), "num_cpus": 1, "num_gpus": 1}
        rows = ray.data.range(3).map_batches(Encode, batch_size=1, **actors).take_all()
        Path(FOLDER, "seen").write_text(f"{context.get_world_size()} workers, {len(rows)} rows")

evaluator = ray.remote(**resources(config.evaluate))(Evaluator).remote()
ray.get(evaluator.gpus.remote())
group, run = worker_group(config.train), ray.train.RunConfig(name="elastic", storage_path=FOLDER)
with watched(config, living_nodes(), "search"):
    DataParallelTrainer(work, scaling_config=group, run_config=run).fit()
print(Path(FOLDER, "seen").read_text())
"""


def test_an_elastic_training_leaves_gpus_to_evaluators_and_the_encoders_of_its_stream(tmp_path: Path) -> None:
    """Otherwise it takes all four, and waits for rows that nobody encodes."""
    lines = ELASTIC.replace("FOLDER", repr(str(tmp_path)))
    assert run_on_gpus(lines, 4, tmp_path)[-1] == "2 workers, 3 rows"


CHECKED = """
from ray_jobs.config import load_config
from ray_jobs.planning.checks import checked

settings = ["train.use_gpu=true", "search.pack=auto", "search.learning_rates=[1.0e-3,2.0e-3]"]
print(checked(load_config("configs/demo.yaml", settings))().trials_together)
"""


def test_trials_are_packed_though_the_memory_of_the_gpus_cannot_be_read_and_a_line_says_so(
    tmp_path: Path,
) -> None:
    *_, line, together = run_on_gpus(CHECKED, 2, tmp_path)
    assert "search.pack: 2 trials together, whatever the memory of the GPUs" in line and together == "2"
