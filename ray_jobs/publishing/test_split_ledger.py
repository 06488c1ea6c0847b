"""Ledger of test split reads: the split may be read once, since a score used for a choice becomes biased.

`<storage>/<run>/test_reads.jsonl` has one line per read and one per finished publishing.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from cluster.storage import Storage
from ray_jobs.config import ConfigError

READS = "test_reads.jsonl"
READ, PUBLISHED = "read", "published"


def open_test(
    run: Storage, weights: str, data: str, forced: bool, former: Callable[[], str] = lambda: ""
) -> int:
    """Record that the test split is about to be read. Call this before loading any of it.

    A publishing that did not finish may read again for the same weights and data: this reveals nothing new.

    Args:
        run: folder of the run.
        weights: digest of the weights to be measured.
        data: digest of the prepared data.
        forced: read even if the split was read before.
        former: function that returns an older release's digest of the same weights; called only if needed.

    Returns:
        Number of reads of the test split by this run, including this one but not such repetitions.

    Raises:
        ConfigError: the split was read before.
    """
    records = read_records(run)
    last = records[-1] if records else None
    same = {"weights": weights, "data": data}
    repeats = (
        last is not None
        and last["event"] == READ
        and last["data"] == data
        and (last["weights"] == weights or last["weights"] == former())
    )
    if last is not None and not repeats and not forced:
        raise ConfigError(
            f"{run.uri}/{READS}: the test split of this run was read at {last['time']}; a score that was "
            "used to choose a model is biased. Give the new settings another name, or read the split again, "
            "which is recorded: python -m ray_jobs.publish --config ... --force"
        )
    records.append({"event": READ, "time": _now(), **same, "forced": forced, "repeats_unfinished": repeats})
    run.write_lines(READS, records)
    return sum(record["event"] == READ and not record["repeats_unfinished"] for record in records)


def close_test(run: Storage, weights: str, data: str) -> None:
    """Record that publishing has finished; any further read must be forced."""
    done = {"event": PUBLISHED, "time": _now(), "weights": weights, "data": data}
    run.write_lines(READS, [*read_records(run), done])


def read_records(run: Storage) -> list[dict[str, Any]]:
    """Read the lines of test_reads.jsonl, oldest first; empty if the file does not exist."""
    return run.read_lines(READS)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
