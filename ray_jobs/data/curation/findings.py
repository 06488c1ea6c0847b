"""Findings of a scan for display: rejected pictures, groups of duplicates, examples."""

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from cluster.storage import Storage
from ray_jobs.config import CleaningConfig, Config
from ray_jobs.data.curation.decisions import Decisions, Matches
from ray_jobs.data.curation.judging import MEASURED, SIZES, fault, reference_fault
from ray_jobs.data.curation.labels import Labels
from ray_jobs.data.curation.line_parts import DUPLICATES, REJECTED, LineParts
from ray_jobs.data.curation.rows import Rows, Run
from ray_jobs.data.curation.scan import Entry, RayRow
from ray_jobs.data.sources.detection import Sample, Source
from ray_jobs.pictures.reading import Rejected, read_picture
from ray_jobs.report.dataset_page import Example

EXAMPLES_A_REASON = 12
DETAILED = ["reason", "detail", *MEASURED]
EXAMPLE_SIDE = 128  # pixels; what a preview shows is smaller than what is read


def write_findings(decisions: Decisions, config: Config, storage: Storage) -> None:
    """Write `rejected.jsonl` and `duplicates.jsonl`.

    `rejected.jsonl` has file_name, reason and detail of every rejected row, including duplicates, in source
    order. `duplicates.jsonl` has one line per group: the first, and the others with the decision on each.
    """
    rows, matches = decisions.rows, decisions.matches
    workers, firsts = rows.workers(), np.unique(matches.firsts)
    names = rows.take(firsts, ["name"])["name"].to_numpy(zero_copy_only=False)
    items = []
    for run in rows.runs:
        low, high = np.searchsorted(matches.rows, [run.low, run.high])
        places = np.searchsorted(firsts, matches.firsts[low:high])
        own = Matches(matches.rows[low:high], matches.firsts[low:high])
        details = {row: text for row, text in decisions.details.items() if run.low <= row < run.high}
        items.append((run, decisions.reasons.at(slice(run.low, run.high)), own, names[places], details))
    rejected, tables = LineParts(storage, REJECTED), [_GROUPED.empty_table()]
    for text, table in workers.each(_Findings(rows.for_tasks(), config.data.cleaning), items):
        rejected.write(text)
        tables.append(table)
    rejected.close()
    duplicates = LineParts(storage, DUPLICATES)
    for text in _groups(pa.concat_tables(tables), dict(zip(firsts.tolist(), names, strict=True))):
        duplicates.write(text)
    duplicates.close()


_GROUPED = pa.schema(
    [("first", pa.int64()), ("row", pa.int64()), ("name", pa.string()), ("reason", pa.string())]
)
_Item = tuple[Run, Labels, Matches, np.ndarray, dict[int, str]]


@dataclass(frozen=True)
class _Findings:
    """Return the lines of a run's rejected rows, and a table of its duplicates."""

    rows: Rows
    cleaning: CleaningConfig

    def __call__(self, item: _Item) -> tuple[str, pa.Table]:
        run, reasons, matches, names_of_firsts, details = item
        involved = ~reasons.are("")
        involved[matches.rows - run.low] = True
        numbers = np.flatnonzero(involved)
        table = self.rows.read(run.low, run.high, ["name", *DETAILED]).take(pa.array(numbers))
        found, written = table["name"].to_pylist(), io.StringIO()
        firsts = dict(zip(matches.rows.tolist(), names_of_firsts, strict=True))
        for number, name, values in zip(numbers.tolist(), found, table.to_pylist(), strict=True):
            if reason := reasons.of_row(number):
                row = run.low + number
                detail = details.get(row) or detail_of(values, self.cleaning)
                detail = f"of {firsts[row]}" if row in firsts else detail
                line = {"file_name": name, "reason": reason, "detail": detail}
                written.write(json.dumps(line, ensure_ascii=False) + "\n")
        names = dict(zip(numbers.tolist(), found, strict=True))
        own = (matches.rows - run.low).tolist()
        columns = [
            pa.array(matches.firsts),
            pa.array(matches.rows),
            pa.array([names[number] for number in own], pa.string()),
            pa.array([reasons.of_row(number) for number in own], pa.string()),
        ]
        return written.getvalue(), pa.Table.from_arrays(columns, schema=_GROUPED)


def detail_of(row: RayRow, cleaning: CleaningConfig) -> str:
    """Return the detail of a row: of its scan, or the threshold that it does not pass.

    Args:
        row: values of DETAILED.
    """
    if not row["reason"]:
        found = fault({name: row[name] for name in SIZES}, cleaning)
        found = found or reference_fault(row["references"] or (), cleaning)
        if found:
            return found.detail
    return str(row["detail"])


def _groups(table: pa.Table, names: dict[int, str]) -> Iterator[str]:
    """Yield the line of each group of duplicates; `names` has those of the first rows."""
    ordered = table.sort_by([("first", "ascending"), ("row", "ascending")])
    rows = (row for batch in ordered.to_batches(1 << 14) for row in batch.to_pylist())
    for first, members in itertools.groupby(rows, key=lambda row: row["first"]):
        others = [{"file_name": row["name"], "set_aside": row["reason"]} for row in members]
        yield json.dumps({"first": names[first], "others": others}, ensure_ascii=False) + "\n"


def examples(
    config: Config,
    sources: Sequence[Source],
    entries: Sequence[Entry],
    decisions: Decisions,
) -> list[Example]:
    """Read up to EXAMPLES_A_REASON pictures of every reason again from their sources."""
    chosen: list[int] = []
    for reason in decisions.reasons.names:
        if reason not in ("", "no_picture"):
            chosen += np.flatnonzero(decisions.reasons.are(reason))[:EXAMPLES_A_REASON].tolist()
    chosen.sort()
    twins = [int(decisions.matches.of(row, row + 1)[0]) for row in chosen]
    needed = sorted({*chosen, *(twin for twin in twins if twin >= 0)})
    samples = dict(_samples(sources, entries, decisions, needed))
    table = decisions.rows.take(np.array(needed, np.int64), ["name", "text", *DETAILED])
    values = dict(zip(needed, table.to_pylist(), strict=True))
    found = []
    for row, twin_row in zip(chosen, twins, strict=True):
        sample, twin = samples.get(row), samples.get(twin_row)
        detail = decisions.details.get(row) or detail_of(values[row], config.data.cleaning)
        found.append(
            Example(
                reason=decisions.reasons.of_row(row),
                name=values[row]["name"],
                caption=values[row]["text"],
                detail=f"of {twin.name}" if twin else detail,
                picture=_thumbnail(config, sample),
                twin=_thumbnail(config, twin),
                twin_name=twin.name if twin else "",
            )
        )
    return found


def _samples(
    sources: Sequence[Source], entries: Sequence[Entry], decisions: Decisions, rows: Sequence[int]
) -> Iterator[tuple[int, Sample]]:
    """Yield the rows' samples, reading each piece once."""
    starts = decisions.rows.starts
    numbers = np.searchsorted(starts, rows, side="right") - 1
    for number in np.unique(numbers):
        entry, start = entries[number], int(starts[number])
        wanted = {row - start for row, of in zip(rows, numbers, strict=True) if of == number}
        for sample in sources[entry.source].read(entry.piece, wanted):
            yield start + sample.row, sample


def _thumbnail(config: Config, sample: Sample | None) -> Image.Image | None:
    if sample is None or sample.problem:
        return None
    data = config.data
    try:
        picture = read_picture(
            sample.data,
            background=data.background,
            max_pixels=data.cleaning.max_pixels,
            at_least=EXAMPLE_SIDE,
        )
    except Rejected:
        return None
    picture.image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
    return picture.image
