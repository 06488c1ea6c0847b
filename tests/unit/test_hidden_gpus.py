"""A CPU run stays on the CPU of a machine that has GPUs, and so do the tests."""

import os
import shlex
from pathlib import Path

import pytest
import yaml

from cluster.local import HIDE_GPUS
from ray_jobs.config import Config
from ray_jobs.data.encoding.encoding import EncodeRows
from tests.conftest import wants_gpus
from tests.k8s.manifests import ROOT


def test_tests_see_no_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("markers", "wanted"),
    [("gpu", True), ("ray and gpu", True), ("", False), ("not gpu", False), ("ray and not faults", False)],
)
def test_only_tests_of_gpus_see_them(markers: str, wanted: bool) -> None:
    assert wants_gpus(markers) is wanted


def test_every_node_hides_gpus_from_what_reserves_none() -> None:
    [settings, *_] = yaml.safe_load_all((ROOT / "k8s/base/settings.yaml").read_text(encoding="utf-8"))
    assert settings["data"].items() >= HIDE_GPUS.items()
    aws = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text(encoding="utf-8"))
    wanted = {f"{name}={value}" for name, value in HIDE_GPUS.items()}
    for kind in ("head", "worker"):
        [start] = [line for line in aws[f"{kind}_start_ray_commands"] if "ray start" in line]
        assert wanted <= set(shlex.split(start.partition(";")[0]))


def test_the_encoders_of_a_cpu_run_stay_on_the_cpu_of_a_machine_with_gpus(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate(
        {
            "name": "encoders",
            "data": {"source": "pictures"},
            "model": {"base": str(tiny_model)},
            "search": {"learning_rates": [1e-3], "ladder": [1]},
        }
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert EncodeRows(config).encoders.device == "cpu"
