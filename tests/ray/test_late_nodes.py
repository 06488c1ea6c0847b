"""A cluster whose autoscaler has no group of nodes with what a run asks for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs.config import Config

pytestmark = pytest.mark.ray  # it has the machine to itself
ROOT = Path(__file__).resolve().parents[2]

STAGE = """
import cluster.watch
import ray
from ray_jobs.run.command_line import run_stage

cluster.watch.LOOK_S, cluster.watch.INFEASIBLE_S = 0.5, 3
text = "A stage.\\n\\n    python -m stage"
run_stage(text, lambda config: ray.get(ray.remote(num_cpus=1, num_gpus=1)(lambda: 1).remote()))
"""


def test_a_run_for_gpus_where_the_autoscaler_has_none_exits_2_with_one_line(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "name": "gpus",
            "storage": str(tmp_path),
            "data": {"source": "pictures"},
            "model": {"base": "model"},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
            "train": {"use_gpu": True},
            "evaluate": {"use_gpu": True},
        }
    )
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    # Without what the Ray of other tests has put there.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, "-c", STAGE, "--config", str(tmp_path / "run.yaml")],
        cwd=ROOT,
        env=environment | {"RAY_enable_autoscaler_v2": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2, result.stdout
    told = [line for line in result.stdout.splitlines() if "use_gpu" in line]
    assert len(told) == 2, result.stdout
    waiting, error = told
    assert "waiting for the autoscaler" in waiting
    assert error == result.stdout.splitlines()[-1]
    assert error.startswith("error: train.use_gpu, evaluate.use_gpu: the run needs 4 GPUs")
    assert error.endswith("no node group of the autoscaler is large enough")
