"""The test split is read once a run, and each reading is on record."""

from datetime import datetime
from pathlib import Path

import pytest

from cluster.storage import Storage
from ray_jobs.config import ConfigError
from ray_jobs.publishing.test_split_ledger import READS, close_test, open_test, read_records


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path)).child("demo")


def finish(run: Storage, weights: str = "w1", data: str = "d1", forced: bool = False) -> int:
    count = open_test(run, weights, data, forced)
    close_test(run, weights, data)
    return count


def test_the_first_reading_is_recorded_before_it_happens(run: Storage) -> None:
    assert open_test(run, "w1", "d1", forced=False) == 1
    [record] = read_records(run)
    assert datetime.fromisoformat(record.pop("time")).tzinfo
    expected = {"event": "read", "weights": "w1", "data": "d1", "forced": False, "repeats_unfinished": False}
    assert record == expected
    assert run.exists(READS)


@pytest.mark.parametrize(("weights", "data"), [("w1", "d1"), ("w2", "d1"), ("w1", "d2")])
def test_a_second_reading_is_refused_with_the_command_that_forces_it(
    run: Storage, weights: str, data: str
) -> None:
    finish(run)
    before = read_records(run)
    with pytest.raises(ConfigError, match=r"was read at .*python -m ray_jobs.publish --config ... --force"):
        open_test(run, weights, data, forced=False)
    assert read_records(run) == before


def test_a_forced_reading_is_counted_and_recorded_as_such(run: Storage) -> None:
    finish(run)
    assert finish(run, weights="w2", forced=True) == 2
    reads = [record for record in read_records(run) if record["event"] == "read"]
    assert [record["forced"] for record in reads] == [False, True]


def test_a_publishing_that_did_not_finish_reads_again_without_being_forced(run: Storage) -> None:
    open_test(run, "w1", "d1", forced=False)
    assert finish(run) == 1
    reads = [record for record in read_records(run) if record["event"] == "read"]
    assert [record["repeats_unfinished"] for record in reads] == [False, True]
    with pytest.raises(ConfigError):
        open_test(run, "w1", "d1", forced=False)


def test_an_unfinished_publishing_of_an_older_release_reads_again_by_its_own_digest(run: Storage) -> None:
    open_test(run, "by its bytes", "d1", forced=False)
    assert open_test(run, "w1", "d1", forced=False, former=lambda: "by its bytes") == 1


@pytest.mark.parametrize(("weights", "data"), [("w2", "d1"), ("w1", "d2")])
def test_an_unfinished_publishing_opens_the_split_for_nothing_else(
    run: Storage, weights: str, data: str
) -> None:
    open_test(run, "w1", "d1", forced=False)
    with pytest.raises(ConfigError):
        open_test(run, weights, data, forced=False)
