"""A set that has grown is looked at only where it is new, and every old picture keeps its split."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.curation import rows as files_of_rows
from ray_jobs.data.curation.assigned import ASSIGNED, FOLDER
from ray_jobs.data.curation.decisions import Decisions, Growth, decide_rows
from ray_jobs.data.curation.growth import looked_at_before
from ray_jobs.data.curation.rows import Rows, gather_rows
from ray_jobs.data.curation.scan import ScanPiece, entries, missing_entries, read_index, scan_settings
from ray_jobs.data.curation.workers import InProcess
from ray_jobs.data.sources.captions import CaptionRules
from ray_jobs.data.sources.samples import Source
from tests.unit.test_captioning import configured, noise
from tests.unit.test_sources import opened, write


class Prepared:
    """A folder that is scanned and decided on as prepare does it, in this process.

    Attributes:
        known: number of rows that an earlier scan looked at.
        scanned: number of the others.
    """

    def __init__(self, source: Source, config: Config, dataset: Storage) -> None:
        self.index, sources = dataset.child("index"), [source]
        self.found = entries(sources, config.data)
        missing = missing_entries(self.found, self.index)
        before = looked_at_before(sources, missing, config.data, dataset, InProcess())
        scan = ScanPiece(sources, config.data, scan_settings(sources, config.data), self.index)
        whole = sum(scan({"entry": each, "before": before.get(each.file)})["rows"] for each in missing)
        self.known = sum(len(each.rows) for each in before.values())
        self.scanned = whole - self.known
        self.rows: Rows = gather_rows(self.found, self.index, dataset, bytes_a_run=1, workers=InProcess())
        whole = len(self.rows)
        self.decisions: Decisions = decide_rows(config, self.rows, whole, dataset, InProcess(), 3)

    def table(self) -> pa.Table:
        columns = ["name", "text", "digest", "width"]
        return pa.concat_tables(read_index(self.index, [each.file for each in self.found], columns))


def named(folder: Path, numbers: Sequence[int]) -> None:
    write(folder, {f"{n:04d}.png": noise(n) for n in numbers} | {f"{n:04d}.txt": f"a {n}" for n in numbers})


def test_rows_are_found_again_wherever_they_are_and_only_new_or_changed_ones_are_read(tmp_path: Path) -> None:
    folder, dataset = tmp_path / "set", Storage.open(str(tmp_path / "dataset"))
    config = configured(folder, "data.cleaning.duplicates=drop", "data.cleaning.max_dark=null")
    named(folder, range(10, 310))
    first = Prepared(opened(folder), config, dataset)
    assert (first.known, first.scanned, len(first.found)) == (0, 300, 3)
    splits = dict(zip(first.table()["name"].to_pylist(), first.decisions.splits.tolist(), strict=True))

    named(folder, [0, 1])  # before all others
    os.utime(folder / "0200.png", ns=(1, 1))  # may have changed
    (folder / "0050.txt").write_text("another caption")
    for name in ("0300.png", "0300.txt"):
        (folder / name).unlink()
    for number in (11, 290):  # were they read, they would not be what they were
        path = folder / f"{number:04d}.png"
        before = os.stat(path)
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = Prepared(opened(folder), config, dataset)
    assert (second.known, second.scanned) == (297, 4)
    table = second.table()
    assert table["name"].to_pylist() == [f"{n:04d}.png" for n in (0, 1, *range(10, 300), *range(301, 310))]
    assert table["text"][42].as_py() == "another caption"
    after = dict(zip(table["name"].to_pylist(), second.decisions.splits.tolist(), strict=True))
    assert {name: after[name] for name in after.keys() & splits} == {
        name: splits[name] for name in after.keys() & splits
    }
    assert second.decisions.growth == Growth(new=2, gone=1) and first.decisions.growth is None

    again = Prepared(opened(folder), config, Storage.open(str(tmp_path / "from nothing")))
    broken = {"0011.png", "0290.png"}
    kept = [row for row in again.table().to_pylist() if row["name"] not in broken]
    assert kept == [row for row in table.to_pylist() if row["name"] not in broken]


def test_other_rules_lines_and_formats_are_looked_at_anew(tmp_path: Path) -> None:
    folder, dataset = tmp_path / "set", Storage.open(str(tmp_path / "dataset"))
    config = configured(folder)
    named(folder, range(5))
    assert Prepared(opened(folder), config, dataset).scanned == 5
    repaired = Prepared(opened(folder, captions=CaptionRules("first")), config, dataset)
    assert (repaired.known, repaired.scanned) == (0, 5)
    by_line = CaptionRules("each")
    assert Prepared(opened(folder, captions=by_line), config, dataset).scanned == 5
    named(folder, [9])
    assert Prepared(opened(folder, captions=by_line), config, dataset).scanned == 6  # rows are lines
    assert Prepared(opened(folder), config, dataset).scanned == 6
    rows = dataset.child(files_of_rows.ROWS)
    for file in rows.files():
        rows.rename(file, file.replace(f"v{files_of_rows.VERSION}-", "v0-"))
    named(folder, [10])
    assert Prepared(opened(folder), config, dataset).scanned == 7


def test_lost_splits_are_named_with_what_mends_them(tmp_path: Path) -> None:
    folder, dataset = tmp_path / "set", Storage.open(str(tmp_path / "dataset"))
    config = configured(folder)
    named(folder, range(30))
    before = Prepared(opened(folder), config, dataset).decisions.splits.tolist()
    dataset.delete(FOLDER)
    with pytest.raises(ConfigError, match="splits of an earlier run cannot be read .* remove assigned"):
        Prepared(opened(folder), config, dataset)
    dataset.delete(ASSIGNED)
    assert Prepared(opened(folder), config, dataset).decisions.splits.tolist() == before
