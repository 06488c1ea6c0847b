"""A run's lease: one driver holds it, and a dead one's is taken over."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster.lease import LEASES, Lease, Owner, held
from cluster.storage import Storage
from ray_jobs.config import ConfigError
from tests.record import record_fault
from tests.s3_server import S3Server, s3_server

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"beat_s": 0.05, "expiry_s": 0.5}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server("runs") as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.open(str(tmp_path / "demo"))
    return Storage.open(request.getfixturevalue("server").address(tmp_path.name))


def elsewhere(**fields: object) -> Owner:
    """A driver on a machine of which this one knows nothing."""
    return replace(Owner.this(), host="other", place="another boot", **fields)  # type: ignore[arg-type]


def leased(run: Storage, owner: Owner | None = None) -> Lease:
    return Lease(run, owner or Owner.this(), **QUICK)


def left_behind(run: Storage, owner: Owner) -> None:
    """A lease as a driver leaves it that was killed."""
    lease = leased(run, owner)
    lease.number = 1
    run.child(LEASES).write_text(lease.name, json.dumps(asdict(owner)))


def test_a_second_driver_is_refused_and_told_who_holds_the_run(run: Storage) -> None:
    first = leased(run)
    first.take()
    with pytest.raises(ConfigError, match=f"name: the run .* is in use by process {os.getpid()} on "):
        leased(run).take()
    first.release()
    where = "a local folder" if run.is_local else "an object store"
    record_fault(f"two drivers of a run, in {where}", recovery_s=None, lost="nothing: one is refused")


def test_a_released_run_is_free_at_once(run: Storage) -> None:
    for _ in range(2):
        begin, lease = time.monotonic(), leased(run)
        lease.take()
        assert time.monotonic() - begin < QUICK["expiry_s"]
        lease.release()
    assert run.child(LEASES).files() == []


def test_a_driver_elsewhere_that_gives_signs_of_life_is_not_taken_for_dead(run: Storage) -> None:
    first = leased(run, elsewhere())
    first.take()
    with pytest.raises(ConfigError, match="in use by process .* on other"):
        leased(run).take()
    first.release()


def test_a_driver_elsewhere_whose_sign_of_life_stands_still_is_dead_whatever_its_clock_says(
    run: Storage,
) -> None:
    left_behind(run, elsewhere(started=time.time() + 1e6))
    begin, lease = time.monotonic(), leased(run)
    lease.take()
    assert time.monotonic() - begin >= QUICK["expiry_s"]
    assert len(run.child(LEASES).files()) == 1
    lease.release()


def test_a_killed_process_of_this_machine_is_known_to_be_dead_at_once(tmp_path: Path) -> None:
    run = Storage.open(str(tmp_path / "demo"))
    program = f"""
import time
from cluster.lease import Lease, Owner
from cluster.storage import Storage
Lease(Storage.open({run.uri!r}), Owner.this()).take()
print("held", flush=True)
time.sleep(100)
"""
    other = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"in use by process {other.pid}"):
        leased(run).take()
    other.kill()
    other.wait()
    begin, lease = time.monotonic(), Lease(run, Owner.this())
    lease.take()
    assert time.monotonic() - begin < 1
    lease.release()


def test_a_process_that_has_got_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    run = Storage.open(str(tmp_path / "demo"))
    left_behind(run, replace(Owner.this(), started=1.0))
    lease = leased(run)
    lease.take()
    lease.release()


def test_of_many_that_start_at_once_no_two_hold_the_run(run: Storage) -> None:
    def start(_: int) -> Lease | None:
        lease = leased(run)
        try:
            lease.take()
        except ConfigError:
            return None
        return lease

    with ThreadPoolExecutor(8) as pool:
        holders = [lease for lease in pool.map(start, range(8)) if lease]
    assert len(holders) == 1 if run.is_local else len(holders) <= 1
    for lease in holders:
        lease.release()


def test_a_driver_that_was_taken_for_dead_stops_and_says_so(tmp_path: Path) -> None:
    run = Storage.open(str(tmp_path)).child("demo")
    with pytest.raises(RuntimeError, match="was taken over by another driver"), held(run, **QUICK):
        run.child(LEASES).write_text("000002.json", json.dumps(asdict(elsewhere())))
        run.child(LEASES).delete("000001.json")
        time.sleep(20)
    assert run.child(LEASES).files() == ["000002.json"]


def test_an_interrupt_releases_the_run(tmp_path: Path) -> None:
    run = Storage.open(str(tmp_path)).child("demo")
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    with pytest.raises(KeyboardInterrupt), held(run, **QUICK):
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()
        time.sleep(20)
    signal.signal(signal.SIGINT, former)
    assert run.child(LEASES).files() == []
