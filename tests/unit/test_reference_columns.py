"""Reference pictures come with the rows of every kind of source, and decide what a row is."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ray_jobs.config import Config, ConfigError, DataConfig
from ray_jobs.data.curation.scan import entries, scan_sample
from ray_jobs.data.encoding.plan import RowKeys
from ray_jobs.data.references import check_references, suited_to_references
from ray_jobs.data.sources.samples import Source
from tests.tiny_models import write as write_model
from tests.unit.test_sources import (
    dreambooth,
    label_studio,
    lines,
    opened,
    picture,
    problems,
    samples,
    write,
    write_parquet,
    write_tar,
)


def image_folder(folder: Path) -> Source:
    rows = [
        {"file_name": f"{n}.png", "text": f"do {n}", "before": f"b/{n}.png", "mask": f"m/{n}.png"}
        for n in range(3)
    ]
    rows[1]["mask"] = "m/none.png"
    pictures: dict[str, bytes | str] = {}
    for n in range(3):
        pictures |= {
            f"x/{n}.png": picture(n),
            f"x/b/{n}.png": picture(10 + n),
            f"x/m/{n}.png": picture(20 + n),
        }
    return opened(
        write(folder, {"x/metadata.jsonl": lines(rows), **pictures}), reference_columns=["before", "mask"]
    )


def parquet(folder: Path) -> Source:
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows: list[dict[str, Any]] = [
        {
            "image": picture(n),
            "text": f"do {n}",
            "before": picture(10 + n),
            "mask": {"bytes": picture(20 + n)},
        }
        for n in range(3)
    ]
    rows[1]["mask"] = None
    path = write_parquet(folder / "a.parquet", rows, mask=struct)
    return opened(path, reference_columns=["before", "mask"])


def captions(folder: Path) -> Source:
    files: dict[str, bytes | str] = {}
    for n in range(3):
        files |= {f"{n}.png": picture(n), f"{n}.txt": f"do {n}", f"before/{n}.jpg": picture(10 + n)}
        files |= {} if n == 1 else {f"mask/{n}.png": picture(20 + n)}
    return opened(write(folder, files), reference_columns=["before", "mask"])


def webdataset(folder: Path) -> Source:
    files: dict[str, bytes | str] = {}
    for n in range(3):
        files |= {f"{n}.before.png": picture(10 + n), f"{n}.png": picture(n), f"{n}.txt": f"do {n}"}
        files |= {} if n == 1 else {f"{n}.mask.png": picture(20 + n)}
    return opened(write_tar(folder / "a.tar", files), reference_columns=["before", "mask"])


KINDS = [image_folder, parquet, captions, webdataset]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_its_references_or_says_which_is_missing(kind: Any, tmp_path: Path) -> None:
    source = kind(tmp_path)
    found = samples(source)
    assert [(s.text, s.data, s.references) for s in (found[0], found[2])] == [
        (f"do {n}", picture(n), (picture(10 + n), picture(20 + n))) for n in (0, 2)
    ]
    assert len(found) == 3 and not found[1].references and not found[1].data
    assert sorted(problems(source).values()) == ["", "", "missing_reference"]
    assert found[1].problem and found[1].problem.detail.startswith("mask: ")


@pytest.mark.parametrize("kind", KINDS)
def test_references_are_scanned_with_their_rows(kind: Any, tmp_path: Path) -> None:
    source, config = kind(tmp_path), DataConfig(source="x", resolution=8)
    row = scan_sample(samples(source)[0], config)
    assert not row["reason"] and isinstance(row["references"], list) and len(row["references"]) == 2
    broken = scan_sample(
        samples(source)[0].__class__(**{**vars(samples(source)[0]), "references": (b"GIF",)}), config
    )
    assert broken["reason"] == "unreadable_reference"


def test_another_choice_of_references_is_scanned_anew(tmp_path: Path) -> None:
    first = image_folder(tmp_path)
    plain, one, other = (
        entries([opened(tmp_path, reference_columns=columns)], DataConfig(source="x"))[0].file
        for columns in ([], ["before"], ["mask"])
    )
    assert len({plain, one, other, entries([first], DataConfig(source="x"))[0].file}) == 4


def test_a_row_with_another_reference_is_encoded_anew() -> None:
    config = Config.model_validate(
        {
            "name": "x",
            "data": {"source": "x"},
            "model": {"base": "x"},
            "search": {"learning_rates": [1e-4], "ladder": [1]},
        }
    )
    keys = RowKeys(config)
    one, other, none = (
        keys.key("a", "text", (8, 8), 0, "train", False, references) for references in (("b",), ("c",), ())
    )
    assert len({one, other, none}) == 3
    assert none == keys.key("a", "text", (8, 8), 0, "train", False)


@pytest.mark.parametrize("kind", [dreambooth, label_studio])
def test_kinds_without_references_refuse_them(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reference_columns: the pictures of .* have no references"):
        opened(kind(tmp_path), reference_columns=["before"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (image_folder, "field 'after' is missing .*reference_columns"),
        (parquet, "no column 'after' .*reference_columns"),
        (captions, "no pictures in after/, which reference_columns names"),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_read(kind: Any, message: str, tmp_path: Path) -> None:
    kind(tmp_path)
    path = next(tmp_path.glob("*.parquet"), tmp_path)
    with pytest.raises(ConfigError, match=message):
        opened(path, reference_columns=["after"])


def edits(base: Path, **data: Any) -> Config:
    return Config.model_validate(
        {
            "name": "edits",
            "data": {"sources": [{"path": "x", "reference_columns": ["before"]}], "resolution": 64, **data},
            "model": {"base": str(base)},
            "search": {"learning_rates": [1e-4], "ladder": [1]},
        }
    )


def test_settings_suit_references_unless_given(tmp_path: Path) -> None:
    suited = suited_to_references(edits(tmp_path))
    assert (suited.search.rank_by, suited.data.cleaning.duplicates) == ("target", "keep")
    given = suited_to_references(edits(tmp_path, cleaning={"duplicates": "drop"}))
    assert given.data.cleaning.duplicates == "drop"
    plain = {
        "name": "x",
        "data": {"source": "x"},
        "model": {"base": "x"},
        "search": {"learning_rates": [1e-4], "ladder": [1], "rank_by": "target"},
    }
    with pytest.raises(ConfigError, match="search.rank_by: target is for models that edit"):
        suited_to_references(Config.model_validate(plain))
    with pytest.raises(ValueError, match="name as many reference_columns in each"):
        edits(tmp_path, sources=[{"path": "x", "reference_columns": ["before"]}, {"path": "y"}])
    with pytest.raises(
        ValueError, match="reference_resolution: 32 changes nothing without reference_columns"
    ):
        DataConfig(source="x", reference_resolution=32)


def test_a_model_that_takes_fewer_references_is_told_before_anything_is_reserved(tmp_path: Path) -> None:
    editor, other = (
        write_model("FluxKontextPipeline", tmp_path / "a"),
        write_model("SanaPipeline", tmp_path / "b"),
    )
    check_references(edits(editor))
    with pytest.raises(ConfigError, match="2 reference images a row, but .*FluxKontextPipeline.* at most 1"):
        check_references(edits(editor, sources=[{"path": "x", "reference_columns": ["a", "b"]}]))
    with pytest.raises(ConfigError, match="SanaPipeline.* takes none"):
        check_references(edits(other))
    with pytest.raises(ConfigError, match="data.reference_resolution: 50 is not a multiple"):
        check_references(edits(editor, reference_resolution=50))
