"""Findings of a scan for display: rejected pictures, groups of duplicates, examples."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from PIL import Image

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.data.curation.decisions import Decisions
from ray_jobs.data.curation.scan import Entry, read_index
from ray_jobs.data.sources.detection import Sample, Source
from ray_jobs.pictures.reading import Rejected, read_picture
from ray_jobs.report.dataset_page import Example

EXAMPLES_A_REASON = 12
EXAMPLE_SIDE = 128  # pixels; what a preview shows is smaller than what is read


def write_findings(entries: Sequence[Entry], index: Storage, decisions: Decisions, storage: Storage) -> None:
    """Write `rejected.jsonl` and `duplicates.jsonl`.

    `rejected.jsonl` has file_name, reason and detail of every rejected row, including duplicates, in source
    order. `duplicates.jsonl` has one line per group: the first, and the others with the decision on each.
    """
    files = [entry.file for entry in entries]
    involved = decisions.matched >= 0
    involved[decisions.matched[involved]] = True
    names: dict[int, str] = {}
    rejected = io.StringIO()
    row = 0
    for table in read_index(index, files, ["name", "detail"]):
        here = slice(row, row + len(table))
        for number in np.flatnonzero((decisions.reasons[here] != "") | involved[here]):
            name, detail = (str(table[column][int(number)].as_py()) for column in ("name", "detail"))
            names[row + int(number)] = name
            detail = decisions.details.get(row + int(number), detail)
            reason, twin = decisions.reasons[row + number], int(decisions.matched[row + number])
            if reason:
                detail = f"of {names[twin]}" if twin in names else detail
                line = {"file_name": name, "reason": reason, "detail": detail}
                rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
        row += len(table)
    storage.write_text("rejected.jsonl", rejected.getvalue())
    groups: dict[int, list[dict[str, str]]] = {}
    for number in np.flatnonzero(decisions.matched >= 0):
        member = {"file_name": names[int(number)], "set_aside": str(decisions.reasons[number])}
        groups.setdefault(int(decisions.matched[number]), []).append(member)
    lines = [
        json.dumps({"first": names[first], "others": others}, ensure_ascii=False) + "\n"
        for first, others in sorted(groups.items())
    ]
    storage.write_text("duplicates.jsonl", "".join(lines))


def examples(
    config: Config,
    sources: Sequence[Source],
    entries: Sequence[Entry],
    index: Storage,
    decisions: Decisions,
) -> list[Example]:
    """Read up to EXAMPLES_A_REASON pictures of every reason again from their sources."""
    taken = Counter[str]()
    chosen: list[int] = []
    for row in np.flatnonzero(decisions.reasons != "").tolist():
        reason = str(decisions.reasons[row])
        if reason == "no_picture":
            continue
        taken[reason] += 1
        if taken[reason] <= EXAMPLES_A_REASON:
            chosen.append(row)
    twins = [int(decisions.matched[row]) for row in chosen]
    needed = sorted({*chosen, *(twin for twin in twins if twin >= 0)})
    samples = dict(_samples(sources, entries, decisions, needed))
    details = _details(entries, index, decisions, needed)
    found = []
    for row, twin_row in zip(chosen, twins, strict=True):
        sample, twin = samples.get(row), samples.get(twin_row)
        name, caption, detail = details[row]
        detail = decisions.details.get(row, detail)
        found.append(
            Example(
                reason=str(decisions.reasons[row]),
                name=name,
                caption=caption,
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
    starts = np.cumsum(decisions.counts) - decisions.counts
    numbers = np.searchsorted(starts, rows, side="right") - 1
    for number in np.unique(numbers):
        entry, start = entries[number], int(starts[number])
        wanted = {row - start for row, of in zip(rows, numbers, strict=True) if of == number}
        for sample in sources[entry.source].read(entry.piece, wanted):
            yield start + sample.row, sample


def _details(
    entries: Sequence[Entry], index: Storage, decisions: Decisions, rows: Sequence[int]
) -> dict[int, tuple[str, str, str]]:
    """Name, caption and detail of the given rows."""
    starts = np.cumsum(decisions.counts) - decisions.counts
    numbers = np.searchsorted(starts, rows, side="right") - 1
    different = [int(number) for number in np.unique(numbers)]
    tables = read_index(index, [entries[number].file for number in different], ["name", "text", "detail"])
    by_number: dict[int, pa.Table] = dict(zip(different, tables, strict=True))
    found = {}
    for row, number in zip(rows, numbers, strict=True):
        values = by_number[int(number)].slice(row - int(starts[number]), 1).to_pylist()[0]
        found[row] = (values["name"], values["text"], values["detail"])
    return found


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
