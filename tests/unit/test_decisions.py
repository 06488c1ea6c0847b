"""What becomes of pictures that resemble each other."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cluster.storage import Storage
from ray_jobs.config import Config, SourceConfig, load_config
from ray_jobs.data.curation.decisions import decide
from ray_jobs.data.curation.findings import write_findings
from ray_jobs.data.curation.line_parts import read_lines
from ray_jobs.data.curation.resolution import connected
from ray_jobs.data.curation.scan import SCHEMA, Entry, entries, scan_sample
from ray_jobs.data.sources.captions import CaptionRules
from ray_jobs.data.sources.samples import Source
from tests.unit.test_sources import opened, picture, write


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_connected_pictures_share_their_least_member(num: int, pairs: list[tuple[int, int]]) -> None:
    edges = [(one % num, other % num) for one, other in pairs]
    found = connected(num, np.array(edges, np.int64).reshape(-1, 2))
    expected = list(range(num))
    for _ in range(num):
        for one, other in edges:
            expected[one] = expected[other] = min(expected[one], expected[other])
    assert found.tolist() == expected


def test_rows_of_a_picture_share_its_split_and_files_that_are_no_rows_are_counted_apart(
    tmp_path: Path,
) -> None:
    for number in range(30):
        name, apostrophe = f"{number:02d}", "\N{RIGHT SINGLE QUOTATION MARK}" if number < 3 else "'"
        write(
            tmp_path / "set",
            {f"{name}.png": picture(number), f"{name}.txt": f"cat{apostrophe}s {name}\na {name}"},
        )
    write(tmp_path / "set", {"notes.md": "x", "README": "x", "bare.png": picture(99)})
    (tmp_path / "set/linked").symlink_to(tmp_path)
    overrides = ["min_side=1", "min_contrast=null", "max_dark=null", "max_bright=null", "duplicates=ignore"]
    config = load_config(
        Path("configs/demo.yaml"),
        [f"data.source={tmp_path / 'set'}", *(f"data.cleaning.{each}" for each in overrides), "data.folds=2"],
    )
    source = opened(tmp_path / "set", captions=CaptionRules("each", repaired=True))
    found = entries([source], config.data)
    index, dataset = Storage.open(str(tmp_path / "index")), Storage.open(str(tmp_path / "dataset"))
    write_index(source, found, config, index)
    decided = decide(config, found, index, dataset)
    kept = decided.kept
    assert (
        kept.sum() == 60
        and decided.num_captions == 60
        and (decided.num_repaired, decided.num_of_lines) == (3, 60)
    )
    for each in (decided.splits.codes, decided.folds):
        assert (each[kept].reshape(30, 2)[:, 0] == each[kept].reshape(30, 2)[:, 1]).all()
    assert decided.rejected == {"missing_caption": 1} and decided.num_judged == 61
    assert decided.left_out == {"unusable_link": 1}
    assert decided.no_pictures == {".md": 1, "without a suffix": 1}
    write_findings(decided, config, dataset)
    written = dataset.read_text("rejected.jsonl")
    assert '"bare.png"' in written and '"linked"' in written and "1 .md, 1 without a suffix" in written


def write_index(source: Source, found: Sequence[Entry], config: Config, index: Storage) -> None:
    for entry in found:
        rows = [scan_sample(sample, config.data) for sample in source.read(entry.piece)]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer)
        index.write_bytes(entry.file, buffer.getvalue())


def test_references_are_of_sizes_like_pictures_whatever_they_show(tmp_path: Path) -> None:
    """Dark, flat and blurred ones are kept, though such pictures are not: an edit may begin with them."""
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    night = noise.point(lambda level: level // 40)  # below 8 everywhere, and not flat
    before = {
        "fine": noise,
        "night": night,
        "blurred": noise.resize((6, 6)).resize((64, 64)),
        "small": noise.resize((20, 64)),
        "long": noise.resize((40, 400)),
        "flat": Image.new("RGB", (64, 64), "teal"),
    }
    folder = tmp_path / "set"
    (folder / "before").mkdir(parents=True)
    for name, reference in before.items():
        noise.save(folder / f"{name}.png")
        reference.save(folder / "before" / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    overrides = ["min_sharpness=50", "min_contrast=1", "duplicates=ignore"]
    config = load_config(Path("configs/demo.yaml"), [f"data.cleaning.{each}" for each in overrides])
    sources = [SourceConfig(path=str(folder), reference_columns=["before"])]
    data = config.data.model_copy(update={"sources": sources, "source": None})
    config = config.model_copy(update={"data": data})
    source = opened(folder, reference_columns=["before"])
    found = entries([source], config.data)
    index, dataset = Storage.open(str(tmp_path / "index")), Storage.open(str(tmp_path / "dataset"))
    write_index(source, found, config, index)
    decided = decide(config, found, index, dataset)
    reasons = dict(zip(sorted(before), decided.reasons.tolist(), strict=True))
    assert reasons == {
        "blurred": "",
        "fine": "",
        "flat": "",
        "long": "extreme_aspect_ratio",
        "night": "",
        "small": "too_small",
    }
    write_findings(decided, config, dataset)
    details = {line["file_name"]: line["detail"] for line in read_lines(dataset, "rejected.jsonl")}
    assert details["small.png"].startswith("reference 1: shorter side 20 is below")
