"""Bits that turn over in the middle of a run: who reads them says so, and the same command mends it."""

import os
import subprocess
import sys
import time
from pathlib import Path

from cluster.connect import LocalCluster
from ray_jobs.data.dataset import Dataset
from ray_jobs.data.parts import ASIDE
from ray_jobs.prepare import prepare
from tests.faults.machines import ROOT
from tests.ray.test_training import tiny_config
from tests.record import record_fault


def digests(dataset: Dataset) -> dict[str, str]:
    return {part["file"]: dataset.cache.sha256(part["file"]) for part in dataset.all_parts}


def flip(file: Path) -> None:
    """Turn one bit in the middle of a file over."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_part_ends_a_training_with_one_line_and_is_encoded_anew(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_model, picture_folder, tmp_path, "train.num_workers=1", "train.max_failures=3")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    dataset = prepare(config)
    before = digests(dataset)
    part = dataset.parts("train")[0]
    flip(Path(dataset.cache.path, part["file"]))
    ended = subprocess.run(
        [sys.executable, "-m", "ray_jobs.train", "--config", str(tmp_path / "run.yaml")],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": ray_cluster.gcs_address},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = ended.stdout.splitlines()
    assert ended.returncode == 2, ended.stdout[-3000:]
    assert lines[-1].startswith(
        f"error: storage: an encoded part is damaged: {dataset.cache.uri}/{part['file']}"
    )
    assert not [line for line in lines if "starting again" in line], "it was tried again"
    assert dataset.cache.exists(part["file"] + ASIDE)
    begun = time.monotonic()
    again = prepare(config)  # what every stage begins with
    assert digests(again) == before
    record_fault(
        "a bit turns over in an encoded part",
        recovery_s=time.monotonic() - begun,
        lost=f"{part['rows']} rows, encoded again",
    )
