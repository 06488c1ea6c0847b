"""What a preflight makes of the GPU nodes' drivers, packages and GPUs."""

from dataclasses import replace
from typing import Any

import pytest

from cluster.preflight import GPU, Equipment, faults, remarks
from ray_jobs.config import Config
from ray_jobs.training.bandwidth import warning

GIB = 2**30
H100 = GPU("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 79 * GIB)
T4 = GPU("Tesla T4", (7, 5), 15 * GIB, 15 * GIB)
GOOD = Equipment("2.13.0", "13.0", "2.29.7", "580.65.06", (H100, H100), cudnn=92000)


def a_config(train: dict[str, Any] | None = None, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "name": "checked",
            "data": {"source": "pictures"},
            "model": {"base": "model"},
            "train": {"use_gpu": True, "precision": "bf16"} | (train or {}),
            "search": {"learning_rates": [1e-3], "ladder": [2]},
        }
        | sections
    )


def told(*nodes: Equipment, stage: str = "train", config: Config | None = None, gpus: int = 2) -> list[str]:
    found = {f"node-{number}": node for number, node in enumerate(nodes, 1)}
    return list(faults(config or a_config(), stage, found, dict.fromkeys(found, gpus)))


def test_good_nodes_are_let_through() -> None:
    assert told(GOOD, GOOD) == []
    assert list(remarks({"a": GOOD, "b": GOOD})) == []


def test_an_old_driver_is_named_with_its_node_and_the_one_that_is_needed() -> None:
    error = "The NVIDIA driver on your system is too old (found version 12020)"
    old = replace(GOOD, driver="535.104.05", gpus=(), error=error)
    assert told(GOOD, old) == [
        "use_gpu: node-2: its NVIDIA driver 535.104.05 is too old for PyTorch's CUDA 13.0; update it to 580 "
        "or newer; docs/troubleshooting.md#version-conflicts"
    ]


@pytest.mark.parametrize(
    ("driver", "said"), [("", "no NVIDIA driver answers"), ("580.65.06", "driver 580.65.06")]
)
def test_gpus_that_cannot_be_used_are_told_with_cuda_s_own_error(driver: str, said: str) -> None:
    broken = replace(GOOD, driver=driver, gpus=(), error="no CUDA-capable device is detected")
    [line] = told(broken)
    assert line.startswith(f"use_gpu: node-1: PyTorch cannot use its GPUs ({said}): no CUDA-capable device")


def test_pytorch_without_cuda_is_told() -> None:
    [line] = told(Equipment("2.13.0+cpu", "", "", error="Torch not compiled with CUDA enabled"))
    assert "PyTorch 2.13.0+cpu on node-1 is built without CUDA" in line


def test_a_node_with_fewer_gpus_than_ray_counts_is_told() -> None:
    [line] = told(GOOD, gpus=8)
    assert line.startswith("use_gpu: PyTorch sees 2 GPUs on node-1, but Ray counts 8")


def test_bf16_needs_ampere_only_where_it_is_used() -> None:
    old = replace(GOOD, gpus=(T4,))
    [line] = told(old, gpus=1)
    assert line.startswith("train.precision: bf16 needs GPUs of compute capability 8.0")
    assert "node-1 has Tesla T4 (7.5)" in line
    assert told(old, gpus=1, config=a_config({"precision": "fp32"})) == []
    on_gpu = a_config(evaluate={"use_gpu": True, "precision": "fp16"})
    assert told(old, gpus=1, stage="evaluate", config=on_gpu) == []
    [line] = told(old, gpus=1, stage="prepare")
    assert line.startswith("data.encode_precision: bf16 needs GPUs") and "use fp32, or newer GPUs" in line


def test_a_share_that_is_too_small_for_a_process_is_told() -> None:
    config = a_config({"gpu_share": 0.005, "num_workers": 1})
    assert told(GOOD, config=config)[0].startswith("train.gpu_share: 0.005 of a GPU of 80 GiB is less than")


def test_nodes_with_different_packages_are_refused() -> None:
    [line] = told(GOOD, replace(GOOD, nccl="2.27.3"))
    assert (
        "node-1: PyTorch 2.13.0, CUDA 13.0, cuDNN 92000, NCCL 2.29.7; "
        "node-2: PyTorch 2.13.0, CUDA 13.0, cuDNN 92000, NCCL 2.27.3"
    ) in line


def test_another_cudnn_on_a_node_is_refused() -> None:
    [line] = told(GOOD, replace(GOOD, cudnn=92100))
    assert "node-1: PyTorch 2.13.0, CUDA 13.0, cuDNN 92000" in line and "cuDNN 92100" in line


def test_occupied_memory_and_different_gpus_are_remarked() -> None:
    busy = replace(GOOD, gpus=(replace(H100, free=20 * GIB), H100))
    assert list(remarks({"a": busy, "b": replace(GOOD, gpus=(T4,))})) == [
        "a: GPU 0 (NVIDIA H100 80GB HBM3) has only 20.0 of 80 GiB free: another program uses it",
        "different GPUs (a: NVIDIA H100 80GB HBM3; b: Tesla T4): a training step takes as long as on the "
        "slowest",
    ]


def test_a_slow_connection_between_workers_is_a_warning() -> None:
    assert warning(200.0, 8) is None
    assert str(warning(1.13, 16)).startswith(
        "slow connection: an all-reduce over 16 workers runs at 1.1 GB/s"
    )
