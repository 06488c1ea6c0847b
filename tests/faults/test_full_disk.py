"""A disk that fills up ends a stage with a message, and what is written before it is whole."""

import time
from pathlib import Path

import pytest
import ray

from cluster.local import LocalCluster
from cluster.storage import Storage
from ray_jobs.data.preparation import prepare
from ray_jobs.run.command_line import FULL
from ray_jobs.training.checkpoint import damaged, folder_of, rungs_of, steps_of
from ray_jobs.training.trainer import build_trainer
from tests.faults.conftest import fill
from tests.ray.test_submit import stage
from tests.ray.test_training import tiny_config
from tests.record import record_fault


def test_encoded_parts_on_a_full_disk(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, tmp_path: Path, disk: Path
) -> None:
    config = tiny_config(tiny_model, picture_folder, disk)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    filler = fill(disk, leave=96 << 10)
    ended = stage(tmp_path / "run.yaml", RAY_ADDRESS=ray_cluster.gcs_address)
    assert ended.returncode == 2
    last = ended.stdout.splitlines()[-1]
    assert last.startswith(f"error: storage: {disk}") and f"{FULL[0]}: free some space" in last
    assert not list(disk.rglob("*.partial")), "what could not be written is taken away"
    filler.unlink()
    begun = time.time()
    there = set(disk.rglob("*.parquet"))
    found = prepare(config).all_parts
    took = min(path.stat().st_mtime for path in set(disk.rglob("*.parquet")) - there) - begun
    quiet = tiny_config(tiny_model, picture_folder, tmp_path / "quiet")
    assert found == prepare(quiet).all_parts
    lost = "the part that did not fit"
    record_fault("the disk is full while Parquet is written, until room is made", recovery_s=took, lost=lost)


def test_a_checkpoint_on_a_full_disk(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, disk: Path
) -> None:
    config = tiny_config(tiny_model, picture_folder, disk, "search.ladder=[2,4,6]", "train.max_failures=0")
    dataset = prepare(config)
    training = Storage.open(config.storage).child(config.name, "train", "full")

    def train(*ladder: int) -> None:
        build_trainer(config, dataset, name="full", ladder=list(ladder)).fit()

    train(2)
    filler = fill(disk, leave=48 << 10)
    with pytest.raises(ray.train.TrainingFailedError, match=FULL[0]):
        train(2, 4, 6)
    assert [rung.step for rung in rungs_of(training)] == [2]
    filler.unlink()
    begun = time.time()
    train(2, 4, 6)
    assert steps_of(training) == [2, 4, 6]
    assert not [name for step in (2, 4, 6) for name in damaged(training.child(folder_of(step)))]
    first = Path(training.path, folder_of(4), "complete-0000-of-0002")
    record_fault(
        "the disk is full while a checkpoint is written, until room is made",
        recovery_s=first.stat().st_mtime - begun,
        lost="the steps since the last whole one",
    )
