"""The test split is read once: what was chosen by it no longer tells how good the choice is.

`<storage>/<run>/test_reads.jsonl` has a line for each reading and one for each publishing that finished.
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
    """Record that the test split is about to be read; to be called before anything of it is loaded.

    A publishing that did not finish may read again, for the same weights and data: that shows nothing new.

    Args:
        run: folder of the run.
        weights: digest of the weights that will be measured.
        data: digest of the prepared data.
        forced: read although it was read before.
        former: the digest that an older release gave the same weights; asked only where it decides.

    Returns:
        How often the run has looked at the test split, this time included and such repetitions not.

    Raises:
        ConfigError: it was read before.
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
            f"{run.uri}/{READS}: the test split of this run was read at {last['time']}; who chooses by it "
            "has none left to trust. Give the new settings another name, or read it again, which is "
            "recorded: python -m ray_jobs.publish --config ... --force"
        )
    records.append({"event": READ, "time": _now(), **same, "forced": forced, "repeats_unfinished": repeats})
    run.write_lines(READS, records)
    return sum(record["event"] == READ and not record["repeats_unfinished"] for record in records)


def close_test(run: Storage, weights: str, data: str) -> None:
    """Record that what was read has been published: from now on a further reading must be forced."""
    done = {"event": PUBLISHED, "time": _now(), "weights": weights, "data": data}
    run.write_lines(READS, [*read_records(run), done])


def read_records(run: Storage) -> list[dict[str, Any]]:
    """The lines of test_reads.jsonl, oldest first; none if there is no such file."""
    return run.read_lines(READS)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
