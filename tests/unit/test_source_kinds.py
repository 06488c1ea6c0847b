"""Folders as other programs write them: the kind of a source is seen from what its files hold.

The Arrow files are written as `save_to_disk` of datasets 5.2 writes them, tables and shards as img2dataset
1.47 does.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.config import ConfigError, load_config
from ray_jobs.data.preparation import open_sources
from ray_jobs.data.sources.arrow import Arrow
from ray_jobs.data.sources.dreambooth import Subject
from ray_jobs.data.sources.folders import Folder
from ray_jobs.data.sources.listing import split_of
from ray_jobs.data.sources.members import split_name
from ray_jobs.data.sources.parquet import Parquet
from ray_jobs.data.sources.samples import read_suffix_text
from ray_jobs.data.sources.webdataset import WebDataset
from tests.unit.test_sources import (
    caption_files,
    dreambooth,
    left_out,
    lines,
    opened,
    picture,
    problems,
    samples,
    write,
    write_parquet,
    write_tar,
)

DEMO = "configs/demo.yaml"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "image": {"_type": "Image"},
    "text": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
}
LIBRARY_INFO = {"citation": "", "description": "", "features": FEATURES, "homepage": "", "license": ""}


def hugging_face_table(numbers: Sequence[int], *, embedded: bool = True) -> pa.Table:
    """Rows as the datasets library holds them, with its description of the columns in the schema."""
    rows = [
        {
            "image": {
                "bytes": picture(n) if embedded else None,
                "path": f"{'' if embedded else '/gone/'}{n}.png",
            },
            "text": f"a {n}",
            "label": n % 2,
        }
        for n in numbers
    ]
    schema = pa.schema([("image", IMAGE), ("text", pa.string()), ("label", pa.int64())])
    described = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    return pa.Table.from_pylist(rows, schema=schema.with_metadata(described))


def write_stream(path: Path, table: pa.Table, rows_a_batch: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)


def saved_to_disk(folder: Path, shards: Sequence[Sequence[int]], **options: Any) -> Path:
    """What Dataset.save_to_disk(folder, num_shards=...) leaves."""
    names = [f"data-{n:05d}-of-{len(shards):05d}.arrow" for n in range(len(shards))]
    for name, numbers in zip(names, shards, strict=True):
        write_stream(folder / name, hugging_face_table(numbers, **options))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "23f1", "_split": "train"}
    return write(folder, {"state.json": json.dumps(state), "dataset_info.json": json.dumps(LIBRARY_INFO)})


def facts(path: Path, **settings: Any) -> list[tuple[str, str, bytes]]:
    return [(s.name, s.text, s.data) for s in samples(opened(path, **settings))]


# The datasets library


def test_a_saved_data_set_is_read_from_the_files_that_its_state_lists(tmp_path: Path) -> None:
    saved_to_disk(tmp_path, [[0, 1, 2], [3]])
    write_stream(tmp_path / "cache-1a2b.arrow", hugging_face_table([7, 8]))
    source = opened(tmp_path, stratify="label")
    assert isinstance(source, Arrow) and source.num_rows is None
    assert [(s.name, s.text, s.data, s.stratum) for s in samples(source)] == [
        ("data-00000-of-00002.arrow: row 0 (0.png)", "a 0", picture(0), "0"),
        ("data-00000-of-00002.arrow: row 1 (1.png)", "a 1", picture(1), "1"),
        ("data-00000-of-00002.arrow: row 2 (2.png)", "a 2", picture(2), "0"),
        ("data-00001-of-00002.arrow: row 0 (3.png)", "a 3", picture(3), "1"),
    ]
    assert [s.row for s in source.read(source.pieces[0], {2})] == [2]
    assert not list(source.read(source.pieces[0], frozenset()))
    assert left_out(source) == {str(tmp_path): "1 .arrow"}


def test_pictures_that_a_saved_data_set_only_points_at_are_said_to_be_missing(tmp_path: Path) -> None:
    [sample, *_] = samples(opened(saved_to_disk(tmp_path, [[0, 1]], embedded=False)))
    assert sample.problem and sample.problem.reason == "missing_file"
    assert "has only the path of a picture, not its bytes" in sample.problem.detail
    assert "(/gone/0.png)" in sample.name


def test_the_splits_of_a_saved_dict_are_one_set_unless_some_are_named(tmp_path: Path) -> None:
    saved_to_disk(tmp_path / "train", [[0, 1]])
    saved_to_disk(tmp_path / "shifted", [[2]])
    write(tmp_path, {"dataset_dict.json": '{"splits": ["train", "shifted"]}'})
    source = opened(tmp_path)
    assert [s.text for s in samples(source)] == ["a 2", "a 0", "a 1"]
    [note] = source.notes
    assert "its splits (shifted, train) are read as one set" in note
    chosen = opened(tmp_path, splits=["train"])
    assert [s.text for s in samples(chosen)] == ["a 0", "a 1"]
    assert "reading only the splits train;" in chosen.notes[0]
    with pytest.raises(ConfigError, match="splits: test: .* has no such split .found: shifted, train"):
        opened(tmp_path, splits=["test"])


@pytest.mark.parametrize("format_", ["stream", "file"])
def test_arrow_files_without_a_state_are_read_in_both_formats(tmp_path: Path, format_: str) -> None:
    table = hugging_face_table([0, 1, 2])
    path = tmp_path / "imagefolder-train.arrow"
    if format_ == "stream":
        write_stream(path, table)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    write(tmp_path, {"dataset_info.json": json.dumps(LIBRARY_INFO)})
    write_stream(tmp_path / "cache-1a2b.arrow", hugging_face_table([7]))
    for source in (tmp_path, path):
        assert [text for _, text, _ in facts(source)] == ["a 0", "a 1", "a 2"]


def test_a_cut_arrow_file_yields_what_precedes_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_stream(path, hugging_face_table(range(6)))
    path.write_bytes(path.read_bytes()[:-400])
    *before, last = samples(opened(path))
    assert [s.text for s in before] == ["a 0", "a 1", "a 2", "a 3"]
    assert last.problem and last.problem.reason == "broken_shard" and last.row == 4
    path.write_bytes(b"no arrow")
    with pytest.raises(ConfigError, match="a.arrow: not a complete Arrow file"):
        opened(path)


def test_a_state_that_lists_a_missing_file_is_refused(tmp_path: Path) -> None:
    saved_to_disk(tmp_path, [[0], [1]])
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match="state.json: lists data-00001-of-00002.arrow, which is missing"):
        opened(tmp_path)


def test_parquet_beside_the_librarys_own_description_is_no_subject(tmp_path: Path) -> None:
    pq.write_table(hugging_face_table([0, 1]), tmp_path / "imagefolder-train.parquet")
    write(tmp_path, {"dataset_info.json": json.dumps(LIBRARY_INFO)})
    source = opened(tmp_path)
    assert isinstance(source, Parquet) and [s.text for s in samples(source)] == ["a 0", "a 1"]
    assert not left_out(source) and not source.notes


def test_prompts_in_a_dataset_info_beside_captions_are_refused(tmp_path: Path) -> None:
    write(dreambooth(tmp_path), {"0.txt": "a dog"})
    with pytest.raises(
        ConfigError, match="has captions .0.txt. and also an instance_prompt in dataset_info.json"
    ):
        opened(tmp_path)


def test_splits_in_the_names_of_parquet_files_are_said_and_can_be_chosen(tmp_path: Path) -> None:
    for split, numbers in {"train": [0, 1], "test": [2]}.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(hugging_face_table(numbers), tmp_path / f"data/{split}-00000-of-00001.parquet")
    source = opened(tmp_path)
    assert len(samples(source)) == 3 and "(test, train) are read as one set" in source.notes[0]
    assert [s.text for s in samples(opened(tmp_path, splits=["test"]))] == ["a 2"]


# Metadata files


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_folder_may_have_a_metadata_file_of_its_own(tmp_path: Path, kind: str) -> None:
    for number, folder in enumerate(("train", "test/deep")):
        write(tmp_path, {f"{folder}/{number}.png": picture(number), f"{folder}/other.png": picture(9)})
        rows = [{"file_name": f"{number}.png", "text": f"in {folder}"}]
        if kind == "parquet":
            write_parquet(tmp_path / folder / "metadata.parquet", rows)
        else:
            text = lines(rows) if kind == "jsonl" else f"file_name,text\n{number}.png,in {folder}\n"
            write(tmp_path, {f"{folder}/metadata.{kind}": text})
    source = opened(tmp_path)
    assert isinstance(source, Folder)
    assert [(s.name, s.text, s.data) for s in samples(source)] == [
        ("test/deep/1.png", "in test/deep", picture(1)),
        ("train/0.png", "in train", picture(0)),
    ]
    assert left_out(source) == {"test/deep/other.png": "not_listed", "train/other.png": "not_listed"}
    assert "(test, train) are read as one set" in source.notes[0]
    assert [s.text for s in samples(opened(tmp_path, splits=["train"]))] == ["in train"]


def test_a_named_column_is_the_one_that_is_trained_on(tmp_path: Path) -> None:
    row = {"file_name": "a.png", "picture": "b.png", "text": "alt text", "caption": "a cat"}
    write(tmp_path, {"jsonl/metadata.jsonl": lines([row])})
    write(tmp_path, {"csv/metadata.csv": "file_name,picture,text,caption\na.png,b.png,alt text,a cat\n"})
    write_parquet(tmp_path / "parquet/metadata.parquet", [row])
    for folder in ("jsonl", "csv", "parquet"):
        write(tmp_path / folder, {"a.png": picture(0), "b.png": picture(1)})
        path = tmp_path / folder
        assert [text for _, text, _ in facts(path)] == ["alt text"]
        assert [text for _, text, _ in facts(path, caption_column="caption")] == ["a cat"]
        named = facts(path, caption_column="caption", image_column="picture")
        assert named == [("b.png", "a cat", picture(1))]
        with pytest.raises(ConfigError, match="field 'words' is missing .*; .* set caption_column"):
            opened(path, caption_column="words")


def test_the_column_caption_is_taken_where_there_is_no_text(tmp_path: Path) -> None:
    write(tmp_path, {"metadata.jsonl": '{"file_name": "a.png", "caption": "a cat"}', "a.png": picture()})
    assert [text for _, text, _ in facts(tmp_path)] == ["a cat"]
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "a.png", "text": "a dog"}')
    with pytest.raises(ConfigError, match="line 2: field 'caption' is missing"):
        opened(tmp_path)


@pytest.mark.parametrize("setting", ["caption_column", "image_column"])
def test_a_source_without_columns_refuses_their_names(tmp_path: Path, setting: str) -> None:
    for kind in (caption_files, dreambooth):
        with pytest.raises(ConfigError, match=f"{setting}: words: .* has only files, no columns"):
            opened(kind(tmp_path / kind.__name__), **{setting: "words"})
    write_tar(tmp_path / "s.tar", {"a.png": picture(), "a.txt": "a"})
    with pytest.raises(ConfigError, match="image_column: words: .* has tar files, which have no columns"):
        opened(tmp_path / "s.tar", image_column="words")
    with pytest.raises(ConfigError, match="splits: train: .* has no such split .it has none"):
        opened(caption_files(tmp_path / "again"), splits=["train"])


def test_a_table_of_pictures_named_metadata_is_a_table(tmp_path: Path) -> None:
    write_parquet(tmp_path / "metadata.parquet", [{"jpg": picture(1), "text": "a"}])
    [sample] = samples(opened(tmp_path, image_column="jpg"))
    assert (sample.text, sample.data) == ("a", picture(1))


def test_a_metadata_file_of_a_subfolder_does_not_hide_the_captions_of_the_others(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(1), "a.txt": "a", "sub/b.png": picture(2)})
    write(tmp_path, {"sub/metadata.jsonl": lines([{"file_name": "b.png", "text": "b"}])})
    with pytest.raises(ConfigError, match="because of sub/metadata.jsonl and a.txt; remove one of them"):
        opened(tmp_path)


def test_what_lies_in_the_folder_comes_before_the_tables_of_a_run_below_it(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(1), "metadata.jsonl": lines([{"file_name": "a.png", "text": "a"}])})
    write_parquet(tmp_path / "runs/encoded/part.parquet", [{"image": picture(2), "text": "b"}])
    assert [s.text for s in samples(opened(tmp_path))] == ["a"]


def test_the_storage_of_runs_is_no_part_of_the_source_that_it_lies_in(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(1), "metadata.jsonl": lines([{"file_name": "a.png", "text": "a"}])})
    paths = [f"data.source={tmp_path}", f"storage={tmp_path}/runs", "data.repair_captions=false"]
    config = load_config(DEMO, paths)
    [before] = open_sources(config)
    write(tmp_path, {"runs/demo/samples/0.png": picture(2), "runs/demo/config.yaml": "name: demo"})
    write_parquet(tmp_path / "runs/encoded/part.parquet", [{"image": picture(2), "text": "b"}])
    [after] = open_sources(config)
    assert after.digest == before.digest and left_out(after) == {}
    write(tmp_path, {"runs-too/b.png": picture(3)})
    [other] = open_sources(config)
    assert other.digest != before.digest and left_out(other)["runs-too/b.png"] == "not_listed"


def test_a_file_of_an_odd_name_is_counted_among_the_others(tmp_path: Path) -> None:
    write(caption_files(tmp_path), {"Smith et al. 2020, notes": b"", "list.json": b"{}"})
    [others] = left_out(opened(tmp_path)).values()
    assert read_suffix_text(others) == {".json": 1, "of other names": 1}


# img2dataset


def img2dataset_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"url": f"https://x/{n}", "caption": f"a {n}", "key": f"{n:09d}", "status": "success", "width": 8}
        for n in range(count)
    ]


def test_img2datasets_shards_are_read_and_the_tables_of_them_are_not(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {}
    for n, row in enumerate(img2dataset_rows(3)):
        key = row["key"]
        members |= {f"{key}.jpg": picture(n), f"{key}.txt": row["caption"], f"{key}.json": json.dumps(row)}
    write_tar(tmp_path / "00000.tar", members)
    write_parquet(tmp_path / "00000.parquet", img2dataset_rows(3))
    write(tmp_path, {"00000_stats.json": "{}"})
    source = opened(tmp_path)
    assert isinstance(source, WebDataset)
    assert [(s.text, s.data) for s in samples(source)] == [(f"a {n}", picture(n)) for n in range(3)]
    assert left_out(source) == {str(tmp_path): "1 .json, 1 .parquet"}


def test_img2datasets_files_are_caption_files(tmp_path: Path) -> None:
    for n, row in enumerate(img2dataset_rows(2)):
        key = f"00000/{row['key']}"
        write(tmp_path, {f"{key}.jpg": picture(n), f"{key}.txt": row["caption"], f"{key}.json": "{}"})
    write_parquet(tmp_path / "00000.parquet", img2dataset_rows(2))
    source = opened(tmp_path)
    assert isinstance(source, Folder) and [s.text for s in samples(source)] == ["a 0", "a 1"]
    assert left_out(source) == {str(tmp_path): "2 .json, 1 .parquet"}


def test_img2datasets_parquet_names_its_columns_otherwise(tmp_path: Path) -> None:
    rows = [row | {"jpg": picture(n)} for n, row in enumerate(img2dataset_rows(2))]
    rows.append(img2dataset_rows(3)[2] | {"jpg": None, "status": "failed_to_download"})
    source = opened(write_parquet(tmp_path / "00000.parquet", rows).parent)
    assert [(s.text, s.data) for s in samples(source)][:2] == [(f"a {n}", picture(n)) for n in range(2)]
    assert list(problems(source).values()) == ["", "", "empty_file"]


def test_two_columns_with_bytes_have_to_be_told_apart(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"one": picture(0), "two": picture(1), "text": "a"}])
    with pytest.raises(ConfigError, match="has 2 columns with bytes .one, two.; name the one"):
        opened(path)
    assert facts(path, image_column="two")[0][2] == picture(1)


def test_tables_without_pictures_alone_say_which_columns_they_have(tmp_path: Path) -> None:
    write_parquet(tmp_path / "00000.parquet", img2dataset_rows(2))
    with pytest.raises(ConfigError, match="has no column 'image' .found: url, caption, key, status, width"):
        opened(tmp_path)


# Files that are no rows


def test_suffixes_in_every_case_and_of_every_picture_are_rows(tmp_path: Path) -> None:
    pictures = ("a.jfif", "b.AVIF", "c.HEIC", "d.Jpe", "e.BMP", "f.svg", "g.CR2", "h.jxl")
    write(tmp_path, {name: picture(n) for n, name in enumerate(pictures)})
    write(tmp_path, {Path(name).stem + ".TXT": f"a {name}" for name in pictures})
    write(tmp_path, {"notes.md": "x", "LICENSE": "x", ".DS_Store": "x", ".thumbs/a.jpg": "x", "z.txt": "x"})
    source = opened(tmp_path)
    assert [(s.name, s.text) for s in samples(source)] == [(name, f"a {name}") for name in pictures]
    counted = "2 hidden, 1 .md, 1 .txt, 1 without a suffix"
    assert left_out(source) == {str(tmp_path): counted}
    subject = tmp_path / "subject"
    write(subject, {name: picture(n) for n, name in enumerate(pictures)})
    found = opened(subject, instance_prompt="a sks dog")
    assert isinstance(found, Subject) and len(samples(found)) == len(pictures)


def test_a_raw_file_beside_its_picture_does_not_speak_against_the_set(tmp_path: Path) -> None:
    write(tmp_path, {"a.JPG": picture(0), "a.CR2": b"raw", "b.cr2": b"raw", "a.txt": "a", "b.txt": "b"})
    for settings in ({}, {"instance_prompt": "a sks dog"}):
        if settings:
            (tmp_path / "a.txt").unlink()
            (tmp_path / "b.txt").unlink()
        source = opened(tmp_path, **settings)
        assert [s.name for s in samples(source)] == ["a.JPG", "b.cr2"]
        assert left_out(source) == {"a.CR2": "other_member"}


def test_a_caption_in_small_letters_comes_before_one_in_capitals(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(), "a.TXT": "capitals", "a.txt": "small"})
    assert [text for _, text, _ in facts(tmp_path)] == ["small"]


def test_nested_and_linked_folders_of_a_subject_are_named(tmp_path: Path) -> None:
    folder = write(
        dreambooth(tmp_path / "set"), {"old/a.png": picture(7), "class_data_dir/b/c.png": picture(8)}
    )
    write(tmp_path, {"elsewhere/d.png": picture(9)})
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = opened(folder)
    assert len(samples(source)) == 6
    assert left_out(source) == {
        "class_data_dir/b/c.png": "in_subfolder",
        "gone.png": "unusable_link",
        "linked": "unusable_link",
        "old/a.png": "in_subfolder",
    }


def test_pictures_beside_shards_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.png": picture(), "a.txt": "a"})
    write(tmp_path, {"banner.png": picture(1)})
    assert left_out(opened(tmp_path)) == {"banner.png": "not_listed"}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("imagefolder-test.arrow", "test"),
        ("data/validation/0000.parquet", "validation"),
        ("val/metadata.csv", "validation"),
        ("shard_train.0001.tar", "train"),
        ("train-station.jpg", None),
        ("latest/contest.parquet", None),
        ("00000.tar", None),
    ],
)
def test_names_tell_splits_by_whole_words(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/x.jpg", ("a/x", "", "jpg")),
        ("v1.0/x.seg.PNG", ("v1.0/x", "seg", "png")),
        ("x.1.2.png", ("x", "1.2", "png")),
        ("a/.hidden.png", ("", "hidden", "png")),
        ("LICENSE", ("LICENSE", "", "")),
    ],
)
def test_a_members_name_is_key_middle_and_suffix(name: str, parts: tuple[str, str, str]) -> None:
    assert split_name(name) == parts
