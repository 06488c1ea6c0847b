"""A store that refuses every tenth write, as a busy one does: what is written is there, byte for byte."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.lease import LEASES, Lease, Owner
from cluster.storage import Storage
from ray_jobs.data.encoding.cache_files import read_part, write_part
from ray_jobs.training.checkpoint import damaged, folder_of, last_intact, rungs_of
from tests.record import record_fault
from tests.s3_server import S3Server, s3_server
from tests.unit.test_checkpoint import write

IN_TIME_S = 300


@pytest.fixture
def server() -> Iterator[S3Server]:
    with s3_server("busy", refuse_every=10) as server:
        yield server


def slowest_write(storage: Storage) -> float:
    """Seconds; of 20 small files, of which some were refused at first."""
    took = []
    for number in range(20):
        begun = time.monotonic()
        storage.write_bytes(f"{number}.bin", bytes([number]) * 100)
        took.append(time.monotonic() - begun)
    assert [storage.read_bytes(f"{number}.bin") for number in range(20)] == [
        bytes([number]) * 100 for number in range(20)
    ]
    return max(took)


def check_uploads(storage: Storage, local: Path) -> None:
    large = np.random.default_rng(0).bytes(12 << 20)  # goes up in pieces
    storage.write_bytes("large.bin", large)
    assert storage.read_bytes("large.bin") == large
    (local / "unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/one", "unet/two"):
        (local / name).write_text(name)
    for _ in range(2):
        storage.upload(local, "model")
    assert [storage.read_text(f"model/{name}") for name in ("model_index.json", "unet/one", "unet/two")] == [
        "model_index.json",
        "unet/one",
        "unet/two",
    ]


def check_parts(cache: Storage) -> None:
    tables = [
        pa.table({"text": [f"{number} {row}" for row in range(8)], "latents": [bytes(4096)] * 8})
        for number in range(12)
    ]
    for number, table in enumerate(tables):
        write_part(cache, f"{number}.parquet", table)
    assert [read_part(cache, f"{number}.parquet") for number in range(12)] == tables


def check_checkpoints(storage: Storage, local: Path) -> None:
    for step in (2, 4, 6):
        write(local, step)
        storage.upload(local / folder_of(step), f"trial/{folder_of(step)}")
    trial = storage.child("trial")
    last = last_intact(trial, pytest.fail)
    assert last is not None and last.path.endswith(folder_of(6))
    assert [rung.step for rung in rungs_of(trial)] == [2, 4, 6]
    assert not [name for step in (2, 4, 6) for name in damaged(trial.child(folder_of(step)))]


def check_lease(run: Storage) -> None:
    lease = Lease(run, Owner.this(), beat_s=0.05, expiry_s=0.5)
    lease.take()
    beats = 12
    while lease.owner.beat < beats:
        time.sleep(0.05)
        assert not lease.lost
    lease.release()
    assert run.child(LEASES).files() == []


@pytest.mark.slow
def test_what_is_written_to_a_store_that_refuses_every_tenth_write_is_there(
    server: S3Server, tmp_path: Path
) -> None:
    storage, begun = Storage.open(server.address("runs")), time.monotonic()
    slowest = slowest_write(storage.child("files"))
    refused = server.refusing.refused
    assert refused
    for check in (
        lambda: check_uploads(storage.child("folders"), tmp_path / "model"),
        lambda: check_parts(storage.child("encoded")),
        lambda: check_checkpoints(storage.child("train"), tmp_path / "trial"),
        lambda: check_lease(storage.child("run")),
    ):
        check()
        assert server.refusing.refused > refused, "nothing was refused"
        refused = server.refusing.refused
    assert time.monotonic() - begun < IN_TIME_S
    record_fault(
        "storage fails every tenth write",
        recovery_s=slowest,
        lost=f"nothing: {refused} writes were sent again",
    )
