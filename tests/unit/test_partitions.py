"""Decisions by runs of rows and hash partitions are those of the rules, however rows are divided."""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.data.curation import assigned
from ray_jobs.data.curation import rows as files_of_rows
from ray_jobs.data.curation.assigned import ASSIGNED, ONE_FILE, split_settings
from ray_jobs.data.curation.composition import compose
from ray_jobs.data.curation.copies import Block, deal, find_copies
from ray_jobs.data.curation.decisions import Decisions, decide, decide_rows
from ray_jobs.data.curation.findings import write_findings
from ray_jobs.data.curation.line_parts import LineParts, read_lines
from ray_jobs.data.curation.rows import Rows, gather_rows
from ray_jobs.data.curation.scan import Entry
from ray_jobs.data.curation.workers import InProcess
from ray_jobs.data.encoding import outlines
from ray_jobs.data.encoding.outlines import outline
from ray_jobs.data.encoding.plan import Planner, chunks
from ray_jobs.run.split import SPLITS, SplitName
from tests.indexed import indexed, write_rows
from tests.plain_decisions import Plain, Row

DIVISIONS = ((1 << 24, 1), (6000, 4), (1, 16))  # bytes of index files in a run, partitions
CHOICES: dict[str, Sequence[str]] = {
    "data.cleaning.duplicates": ("drop", "keep", "ignore"),
    "data.cleaning.min_contrast": ("null", "20"),
    "data.folds": ("0", "3"),
    "data.stratify": ("null", "kind"),
    "data.validation": ("0.3", "0"),
}


def configured(*overrides: str) -> Config:
    plain = ["data.source=x", "data.test=0.3", "data.cleaning.min_sharpness=null", "data.cleaning.min_side=1"]
    return load_config(Path("configs/demo.yaml"), [*plain, *overrides])


def drawn(seed: int) -> list[dict[str, Any]]:
    """Rows of which many are like others: copies, other captions, some bits away, or unusable."""
    draw = np.random.default_rng(seed)
    centres = draw.integers(0, 2**63, 5).tolist(), draw.integers(0, 256, (5, 48), np.uint8)
    pictures = []
    for number in range(int(draw.integers(1, 50))):
        centre = int(draw.integers(0, 5))
        flipped = sum({1 << int(bit) for bit in draw.integers(0, 63, int(draw.integers(0, 6)))})
        picture = {
            "digest": hashlib.sha256(f"{seed} {number}".encode()).hexdigest(),
            "hash": centres[0][centre] ^ flipped,
            "colours": (centres[1][centre] ^ np.uint8(draw.integers(0, 2))).tobytes(),
            "contrast": float(draw.uniform(0, 80)),
            "stratum": f"kind {draw.integers(0, 3)}",
        }
        pictures.append(picture)
    rows = []
    for _ in range(int(draw.integers(0, 80))):
        row = dict(pictures[int(draw.integers(0, len(pictures)))])
        row |= {"text": f"a {draw.integers(0, 4)}", "lines": int(draw.integers(1, 3))}
        if draw.random() < 0.1:
            row |= {"reason": "truncated", "detail": "cut off"}
        rows.append(row)
    return rows


def in_files(index: Storage, rows: Sequence[Row], seed: int) -> list[Entry]:
    """Write rows in files of different lengths, some of them empty."""
    cuts = sorted(np.random.default_rng(seed).integers(0, len(rows) + 1, 6).tolist())
    found = []
    for number, (low, high) in enumerate(itertools.pairwise([0, *cuts, len(rows)])):
        write_rows(index, f"{number}.parquet", rows[low:high])
        found.append(indexed(f"{number}.parquet"))
    return found


def decided_in_parts(
    config: Config, entries: Sequence[Entry], index: Storage, dataset: Storage, bytes_a_run: int, parts: int
) -> Decisions:
    rows = gather_rows(entries, index, dataset, bytes_a_run=bytes_a_run, workers=InProcess())
    return decide_rows(config, rows, len(rows), dataset, InProcess(), parts)


def require_equal(found: Decisions, plain: Plain) -> None:
    assert found.reasons.tolist() == [each.reason for each in plain.found]
    assert found.matches.of(0, len(plain.found)).tolist() == [each.matched for each in plain.found]
    assert found.splits.tolist() == [each.split for each in plain.found]
    assert [int(fold) for fold in found.folds] == [each.fold for each in plain.found]


@pytest.mark.parametrize("seed", range(16))
def test_decisions_are_those_of_the_rules_also_when_the_set_has_grown(seed: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(seed)
    config = configured(*(f"{field}={draw.choice(values)}" for field, values in CHOICES.items()))
    rows = drawn(seed)
    for number, (bytes_a_run, parts) in enumerate(DIVISIONS):
        index, dataset = (Storage.open(str(tmp_path / f"{name}{number}")) for name in ("index", "set"))
        entries, known = in_files(index, rows, seed), dict[str, SplitName]()
        for some in (entries[::2], entries):  # rows are added between the others
            inside = [dict(row) for entry in some for row in whole(index, entry)]
            plain = Plain(inside, config, known)
            require_equal(decided_in_parts(config, some, index, dataset, bytes_a_run, parts), plain)
            if any(each.split in ("validation", "test") for each in plain.found):
                known = {inside[n]["digest"]: plain.split[n] for n in plain.pictures if plain.kept[n]}


def whole(index: Storage, entry: Entry) -> list[dict[str, Any]]:
    return list(pq.read_table(pa.BufferReader(index.read_bytes(entry.file))).to_pylist())


def test_aggregates_lists_and_parts_do_not_depend_on_the_division(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rows, "workers", lambda rows: InProcess())
    monkeypatch.setattr(outlines, "CHUNKS_A_TASK", 2)
    config, found = configured("data.stratify=kind", "data.cleaning.min_contrast=20"), []
    index = Storage.open(str(tmp_path / "index"))
    entries = in_files(index, [row for seed in range(6) for row in drawn(seed)], 0)
    for number, (bytes_a_run, parts) in enumerate(DIVISIONS):
        monkeypatch.setattr(outlines, "ROWS_A_PARTITION", 400 // parts)
        monkeypatch.setattr(files_of_rows, "ROWS_A_BATCH", (4096, 7, 64)[number])
        dataset = Storage.open(str(tmp_path / f"set{number}"))
        decisions = decided_in_parts(config, entries, index, dataset, bytes_a_run, parts)
        write_findings(decisions, config, dataset)
        planned = Planner.of(config, decisions, [(64, 64)])
        described = outline(planned, chunks(entries, decisions), len(decisions.rows), InProcess())
        counts = decisions.rejected, decisions.duplicates, decisions.num_captions, decisions.num_of_lines
        histograms = {name: counts.tolist() for name, counts in decisions.histograms.items()}
        lists = [dataset.read_text(name) for name in ("rejected.jsonl", "duplicates.jsonl")]
        found.append((counts, histograms, lists, compose(config, decisions).fields(), described))
    assert found[0] == found[1] == found[2] and all(found[0][2]) and found[0][4].parts


@pytest.mark.parametrize("partitions", [1, 3])
def test_copies_are_found_in_any_order_of_blocks(partitions: int) -> None:
    draw = np.random.default_rng(0)
    words = draw.integers(0, 2**60, (20, 2), np.uint64)[draw.integers(0, 20, 100)]
    block = Block(draw.permutation(1000)[:100], words, draw.integers(0, 3, 100).astype(np.uint64))
    halves = [Block(*(column[part::4] for column in block)) for part in range(4)]
    found = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        dealt = [deal(halves[number], partitions) for number in order]
        copies = [find_copies([blocks[n] for blocks in dealt]) for n in range(partitions)]
        columns = zip(*((each.later, each.repeated) for each in copies), strict=True)
        found.append([sorted(map(tuple, np.concatenate(pairs).tolist())) for pairs in columns])
    assert found[0] == found[1] and len(found[0][0]) == 100 - len(np.unique(words[:, 0]))


def test_splits_that_an_earlier_release_assigned_are_kept(tmp_path: Path) -> None:
    config, index = configured(), Storage.open(str(tmp_path / "index"))
    rows = [{"digest": hashlib.sha256(bytes([n])).hexdigest(), "hash": n << 20 | n} for n in range(40)]
    write_rows(index, "a", rows)
    dataset, known = Storage.open(str(tmp_path / "set")), dict[str, SplitName]()
    for number, row in enumerate(rows[:30]):
        known[str(row["digest"])] = SPLITS[number % 3]
    former = pa.table({"digest": list(known), "split": list(known.values())})
    content = pa.BufferOutputStream()
    pq.write_table(former.replace_schema_metadata({"settings": split_settings(config)}), content)
    dataset.write_bytes(ONE_FILE, content.getvalue().to_pybytes())
    config = configured("data.cleaning.duplicates=ignore")
    decided = decide(config, [indexed("a")], index, dataset)
    assert decided.splits.tolist()[:30] == list(known.values())
    assert not dataset.exists(ONE_FILE) and dataset.exists(ASSIGNED)
    assert decide(config, [indexed("a")], index, dataset).splits.tolist() == decided.splits.tolist()
    assert assigned.known_files(configured("data.split_seed=7"), dataset) == []


def test_damaged_files_are_named_with_what_mends_them(tmp_path: Path) -> None:
    index, dataset = Storage.open(str(tmp_path / "index")), Storage.open(str(tmp_path / "set"))
    write_rows(index, "a", [{}, {}])
    rows = gather_rows([indexed("a")], index, dataset)
    file = dataset.child("rows").files()[0]
    dataset.child("rows").write_bytes(file, b"ARROW1\0\0 damaged")
    with pytest.raises(ConfigError, match=f"rows/{file}: the file of rows is damaged .* remove it and run"):
        rows.read(0, 2, ["text"])
    index.write_bytes("b", b"PAR1 damaged")
    with pytest.raises(ConfigError, match="index/b: the index file is damaged .* looks at its pictures anew"):
        gather_rows([indexed("a"), indexed("b")], index, dataset)


def test_a_list_above_a_size_is_a_folder_and_is_read_the_same(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    for sizes in ([3], [3, 50, 40, 1], [70, 70], [2]):
        written = LineParts(storage, "rejected.jsonl", bytes_a_part=600)
        for number, size in enumerate(sizes):
            written.write("".join(f'{{"part": {number}, "line": {line}}}\n' for line in range(size)))
        written.close()
        expected = [{"part": n, "line": line} for n, size in enumerate(sizes) for line in range(size)]
        assert list(read_lines(storage, "rejected.jsonl")) == expected
        assert storage.exists("rejected.jsonl") == (sum(sizes) < 30)
