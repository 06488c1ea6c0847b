"""Bits that turn over in the middle of a run: who reads them says so, and the same command mends it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import ray

from cluster.local import LocalCluster
from cluster.storage import Storage
from ray_jobs.console.board import ProgressBoard
from ray_jobs.data.encoding.cache_files import ASIDE
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.preparation import prepare
from ray_jobs.training.checkpoint import STATE, damaged, folder_of
from ray_jobs.training.trainer import build_trainer
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
        f"error: storage: an encoded file is damaged: {dataset.cache.uri}/{part['file']}"
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


def test_a_damaged_checkpoint_is_told_and_its_steps_are_taken_again(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_model, picture_folder, tmp_path, "train.num_workers=1", "search.ladder=[2,3]")
    dataset, name = prepare(config), "damaged"
    board = ray.remote(num_cpus=0)(ProgressBoard).remote()

    def train() -> None:
        build_trainer(config, dataset, name=name, board=board).fit()

    train()
    last = Storage.open(config.storage).child(config.name, "train", name, folder_of(3))
    [state] = last.child(STATE).files()
    before = last.sha256(f"{STATE}/{state}")
    flip(Path(last.path, STATE, state))
    begun = time.time()
    train()
    assert f"{last.uri} is passed over: damaged: {STATE}/{state}" in ray.get(board.take.remote())
    assert last.sha256(f"{STATE}/{state}") == before and not damaged(last)
    took = Path(last.path, "complete-0000-of-0001").stat().st_mtime - begun
    record_fault("a bit turns over in a checkpoint", recovery_s=took, lost="1 step, taken again")
    ray.kill(board)
