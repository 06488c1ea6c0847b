"""`data.balance`: values of a column come equally often in training, and evaluation stays as it is."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.data.curation.decisions import Decisions, decide
from ray_jobs.data.curation.scan import SCHEMA, Entry, entries, scan_sample
from ray_jobs.data.encoding.plan import PlannedPart, plan_parts
from ray_jobs.data.feeding.streaming import StreamSettings
from ray_jobs.data.manifest import balance_line, describe
from ray_jobs.data.sources.detection import Source
from tests.unit.test_captioning import configured, noise, with_duplicates
from tests.unit.test_sources import caption_files, lines, opened, tar_files, write

COUNTS = {"cat": 30, "dog": 6, "": 3}


class Planned:
    """A scanned, decided and planned folder with a column `kind`."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        plain = configured(folder, *overrides)
        self.config: Config = with_duplicates(plain, "ignore")
        self.source: Source = opened(folder, self.config.data.column)
        index = Storage.open(str(folder.parent / "index"))
        self.found: list[Entry] = entries([self.source], self.config.data)
        for entry in self.found:
            rows = [scan_sample(sample, self.config.data) for sample in self.source.read(entry.piece)]
            buffer = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer)
            index.write_bytes(entry.file, buffer.getvalue())
        dataset = Storage.open(str(folder.parent / "dataset"))
        self.decisions: Decisions = decide(self.config, self.found, index, dataset)
        self.parts: list[PlannedPart] = list(plan_parts(self.config, self.found, self.decisions, [(32, 32)]))

    def of(self, split: str) -> list[PlannedPart]:
        return [part for part in self.parts if part.split == split]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    kinds = [kind for kind, count in COUNTS.items() for _ in range(count)]
    rows: list[dict[str, Any]] = [
        {"file_name": f"{n}.png", "text": f"a {n}", "kind": kind} for n, kind in enumerate(kinds)
    ]
    pictures: dict[str, bytes | str] = {f"{n}.png": noise(n) for n in range(len(kinds))}
    return write(tmp_path / "set", {**pictures, "metadata.jsonl": lines(rows)})


def test_every_value_comes_equally_often_and_no_row_is_left_out(folder: Path) -> None:
    planned = Planned(folder, "data.balance=kind", "data.validation=0", "data.test=0")
    training = planned.of("train")
    assert Counter({part.value: len(part.rows) for part in training}) == COUNTS
    order = StreamSettings(planned.config, 6, 1, ()).order([part.record() for part in training], 1 << 20)
    assert order.rows_an_epoch == 3 * 30
    assert list(order.shares().values()) == pytest.approx([1 / 3] * 3)
    seen = Counter(
        (part, row)
        for window in order.windows(1, 2 * 15)  # two epochs
        for step in order.steps(window)
        for part, row in step.rows.tolist()
    )
    times = {
        training[number].value: {count for (part, _), count in seen.items() if part == number}
        for number in range(len(training))
    }
    assert times == {"cat": {2}, "dog": {10}, "": {20}} and len(seen) == 39
    outlines = [part.outline() for part in planned.parts]
    assert balance_line(planned.config, outlines) == (
        "data.balance: 3 values of kind come equally often in training; an epoch has 90 rows for 39, and "
        "repeats those of the rarest value ((empty), 3 rows) 10 times"
    )
    counts = Counter[str]()
    manifest = describe(planned.config, [planned.source], planned.decisions, outlines, counts)
    assert [source.share for source in manifest.source] == pytest.approx([1.0])


def test_splits_and_rows_are_as_without_it_and_so_are_records(folder: Path) -> None:
    balanced, plain = Planned(folder, "data.balance=kind"), Planned(folder)
    for split in ("train", "validation", "test"):
        keys = [sorted(key for part in each.of(split) for key in part.keys) for each in (balanced, plain)]
        assert keys[0] == keys[1] and keys[0]
    assert {part.value for part in balanced.of("validation")} <= set(COUNTS)
    assert {part.record().get("value") for part in balanced.of("test")} == {""}
    assert not [part for part in plain.parts if "value" in part.record()]
    assert balance_line(plain.config, [part.outline() for part in plain.parts]) is None


def test_a_column_that_is_missing_or_of_no_use_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="field 'size' is missing .* correct data.stratify or data.balance"):
        Planned(folder, "data.balance=size")
    with pytest.raises(ConfigError, match="data.stratify or data.balance: kind: .* has only files"):
        opened(caption_files(tmp_path / "files"), "kind")
    tars = opened(tar_files(tmp_path / "tars"), "kind")
    found = [sample.problem for piece in tars.pieces for sample in tars.read(piece)]
    assert {problem and problem.reason for problem in found} == {"missing_stratum"}
    one = Planned(
        write(tmp_path / "one", {"0.png": noise(0), "metadata.jsonl": lines([ROW])}), "data.balance=kind"
    )
    with pytest.raises(ConfigError, match="the training pictures have 1 values of it, but 2 to 256 can be"):
        balance_line(one.config, [part.outline() for part in one.parts])


ROW = {"file_name": "0.png", "text": "a", "kind": "cat"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{source: x, balance: kind, stratify: size}", "balance: kind is another column than stratify, size"),
        ("{balance: kind, sources: [{path: a, weight: 1}]}", "balance: sources have weights"),
        ('{source: x, balance: ""}', "at least 1 character"),
    ],
)
def test_settings_that_contradict_are_refused(settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Path("configs/demo.yaml"), [f"data={settings}"])
