"""What a dataset is made of: words, repeated captions, sizes, brightness and classes of what is kept."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.storage import Storage
from ray_jobs.data.curation.composition import compose
from ray_jobs.data.curation.decisions import decide
from ray_jobs.data.curation.scan import SCHEMA, entries, scan_sample
from tests.unit.test_captioning import configured, with_duplicates
from tests.unit.test_sources import lines, opened, write


def picture(side: int, grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, 2 * side), (grey, grey, grey)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_kept_pictures_are_counted_by_words_captions_sizes_brightness_and_class(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.png", "text": "A cat's ball, on the mat", "kind": "cat"} for n in range(8)]
    rows += [{"file_name": "8.png", "text": "two dogs, one dog's ball", "kind": "dog"}]
    rows += [{"file_name": "9.png", "text": "never read", "kind": "dog"}]
    files: dict[str, bytes | str] = {f"{n}.png": picture(40 + n, 250) for n in range(8)}
    folder = write(
        tmp_path / "set",
        {**files, "8.png": picture(80, 3), "9.png": b"broken", "metadata.jsonl": lines(rows)},
    )
    config = configured(folder, "data.stratify=kind", "data.resolution=44")
    source = opened(folder, "kind")
    index = Storage.open(str(tmp_path / "index"))
    found = entries([source], config.data)
    for entry in found:
        buffer = io.BytesIO()
        scanned = [scan_sample(sample, config.data) for sample in source.read(entry.piece)]
        pq.write_table(pa.Table.from_pylist(scanned, schema=SCHEMA), buffer)
        index.write_bytes(entry.file, buffer.getvalue())
    config = with_duplicates(config, "ignore")
    told = compose(config, decide(config, found, index, Storage.open(str(tmp_path / "out"))))
    assert told.pictures == 9 and told.column == "kind"
    assert told.words == {"ball": 9, "cat's": 8, "mat": 8, "two": 1, "dogs": 1, "one": 1, "dog's": 1}
    assert told.repeated == {"A cat's ball, on the mat": 8} and told.num_repeated == 8
    assert told.enlarged == 4  # sides of 40 to 43
    assert {value: each.pictures for value, each in told.classes.items()} == {"cat": 8, "dog": 1}
    assert told.scarce == {"dog": 1} and told.num_scarce == 1
    sides = told.spreads["side"]
    found_sides = zip(sides.edges, sides.counts, strict=False)
    assert {edge: count for edge, count in found_sides if count} == {32.0: 5, 45.0: 3, 64.0: 1}
    assert told.classes["dog"].spreads["brightness"].counts == [1, *[0] * 15]
    assert told.classes["cat"].spreads["brightness"].counts == [*[0] * 15, 8]
