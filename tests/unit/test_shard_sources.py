"""Parquet and tar files: where bytes and captions come from, and what is left of a damaged file."""

import random
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.config import ConfigError
from ray_jobs.data.sources.parquet import ROWS_AT_ONCE
from tests.unit.test_sources import (
    all_samples,
    left_out,
    one_tar,
    opened,
    parquet_files,
    picture,
    problems,
    samples,
    write_parquet,
    write_tar,
)

# Parquet


def test_parquet_has_a_piece_a_row_group_and_names_rows_of_the_file(tmp_path: Path) -> None:
    source = opened(parquet_files(tmp_path))
    assert [piece.name for piece in source.pieces] == [
        "data/a.parquet: row group 0",
        "data/a.parquet: row group 1",
        "data/b.parquet: row group 0",
    ]
    found = list(source.read(source.pieces[1]))
    assert [(s.row, s.name, s.text, s.data) for s in found] == [
        (0, "data/a.parquet: row 4 (4.png)", "a 4", picture(4)),
        (1, "data/a.parquet: row 5 (5.png)", "a 5", picture(5)),
    ]


@pytest.mark.parametrize("image", [pa.binary(), pa.large_binary(), pa.binary_view()])
@pytest.mark.parametrize(
    "text",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int8(), pa.string())],
)
def test_parquet_takes_bytes_and_captions_of_every_width(
    tmp_path: Path, image: pa.DataType, text: pa.DataType
) -> None:
    rows = [{"img": picture(n), "label": "é" if pa.types.is_string(text) else "e", "n": n} for n in range(3)]
    path = write_parquet(tmp_path / "a.parquet", rows, img=image, label=text)
    source = opened(path, stratify="n", image_column="img", caption_column="label")
    expected = [(f"a.parquet: row {n}", rows[n]["label"], picture(n), str(n)) for n in range(3)]
    assert [(s.name, s.text, s.data, s.stratum) for s in samples(source)] == expected


def test_parquet_rows_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    data = picture()
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": None, "path": "gone.png"}, "text": b"a"},
        {"image": {"bytes": None, "path": None}, "text": b"a"},
        {"image": None, "text": b"a"},
        {"image": {"bytes": data, "path": None}, "text": None},
        {"image": {"bytes": data, "path": None}, "text": b" "},
        {"image": {"bytes": data, "path": None}, "text": b"caf\xe9"},
        {"image": {"bytes": data, "path": None}, "text": b"a"},
    ]
    found = problems(opened(write_parquet(tmp_path / "a.parquet", rows)))
    assert list(found.values()) == [
        "missing_file",
        "empty_file",
        "empty_file",
        "missing_caption",
        "empty_caption",
        "caption_not_utf8",
        "",
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"image_column": "picture"}, r"has no column 'picture' \(found: image, text, tags\)"),
        ({"caption_column": "label"}, r"has no column 'label' \(found: image, text, tags\)"),
        ({"image_column": "text"}, "column 'text' is string, not binary"),
        ({"caption_column": "image"}, "column 'image' is binary, not string|column 'image' is struct"),
        ({"stratify": "tags"}, "column 'tags' is list.*correct data.stratify"),
    ],
)
def test_a_wrong_column_is_named_with_those_there_are(
    tmp_path: Path, settings: dict[str, str], expected: str
) -> None:
    rows = [{"image": {"bytes": picture(), "path": ""}, "text": "a", "tags": ["b"]}]
    with pytest.raises(ConfigError, match=f"a.parquet: {expected}"):
        opened(write_parquet(tmp_path / "a.parquet", rows), **settings)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    for file in parquet_files(tmp_path).rglob("b.parquet"):
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="data/b.parquet: not a complete Parquet file"):
        opened(tmp_path)


def test_a_row_group_that_breaks_off_yields_what_precedes_the_damage(tmp_path: Path) -> None:
    noise = [random.Random(n).randbytes(20_000) for n in range(4 * ROWS_AT_ONCE)]
    table = pa.table({"image": noise, "text": ["a"] * len(noise)})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, use_dictionary=False, write_batch_size=8)
    content = path.read_bytes()
    damaged = content.index(noise[200][:64])
    path.write_bytes(content[:damaged] + bytes(len(noise) * 2000) + content[damaged + len(noise) * 2000 :])
    *before, last = samples(opened(path))
    assert last.problem and last.problem.reason == "broken_shard"
    assert last.row == len(before) and ROWS_AT_ONCE <= len(before) < len(noise)
    assert [sample.data for sample in before] == noise[: len(before)]


# Tar


def test_tar_members_with_the_same_key_make_a_sample(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "README.md": "no sample",
        "a/0.txt": "in a",
        "a/0.JPG": picture(0),
        "b/0.jpg": picture(1),
        "b/0.seg.png": picture(9),
        "b/0.json": '{"caption": "in b", "place": "sea"}',
        "b/._1.jpg": "of a Mac",
        "1.webp": picture(2),
        "1.cls": "5",
        "1.txt": "text first",
        "1.json": '{"text": "json", "blip": "a seal"}',
    }
    source = opened(write_tar(tmp_path / "s.tar", files))
    assert [(s.name, s.text, s.data) for s in samples(source)] == [
        ("s.tar: a/0.JPG", "in a", picture(0)),
        ("s.tar: b/0.jpg", "in b", picture(1)),
        ("s.tar: 1.webp", "text first", picture(2)),
    ]
    assert left_out(source) == {"s.tar: b/0.seg.png": "other_member", "s.tar": "1 .cls, 1 .md, 1 hidden"}


def test_a_key_that_is_named_is_read_from_the_json_or_the_sample_is_set_aside(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "0.png": picture(0),
        "0.txt": "text",
        "1.png": picture(1),
        "1.txt": "text",
        "1.json": '{"text": "json", "blip": "a seal", "place": "sea"}',
        "2.png": picture(2),
        "2.txt": "text",
        "2.json": '{"blip": null, "place": null}',
    }
    write_tar(tmp_path / "s.tar", files)
    named = samples(opened(tmp_path / "s.tar", caption_column="blip"))
    assert [(s.text, s.problem and s.problem.reason) for s in named] == [
        ("", "missing_caption"),
        ("a seal", None),
        ("", "missing_caption"),
    ]
    assert [s.text for s in samples(opened(tmp_path, caption_column="text"))] == ["", "json", ""]
    assert [s.text for s in samples(opened(tmp_path, caption_column="txt"))] == ["text"] * 3
    strata = samples(opened(tmp_path, stratify="place"))
    assert [(s.stratum, s.problem and s.problem.reason) for s in strata] == [
        ("", "missing_stratum"),
        ("sea", None),
        ("", None),
    ]


@pytest.mark.parametrize(
    ("files", "rows", "rest"),
    [
        (["IMG_1.0.png", "IMG_1.0.txt", "IMG_1.1.png", "IMG_1.1.TXT"], ["IMG_1.0.png", "IMG_1.1.png"], {}),
        (["v1.2.3/a.png", "v1.2.3/a.txt"], ["v1.2.3/a.png"], {}),
        (["x.depth.png", "x.jpg", "x.seg.png", "x.txt"], ["x.jpg"], ["x.depth.png", "x.seg.png"]),
        (["x.jpg", "x.png", "x.txt"], ["x.jpg"], ["x.png"]),
        (["x.jpg", "x.old.jpg", "x.old.txt", "x.txt"], ["x.old.jpg", "x.jpg"], []),
        (["x.image.png", "x.txt"], ["x.image.png"], []),
        (["x.json", "x.target.png"], ["x.target.png"], []),
        (["a.jfif", "a.txt", "b.AVIF", "b.txt"], ["a.jfif", "b.AVIF"], []),
    ],
)
def test_names_with_dots_are_samples_of_their_own_or_other_pictures_of_one(
    tmp_path: Path, files: list[str], rows: list[str], rest: list[str]
) -> None:
    content: dict[str, bytes | str] = {
        name: '{"text": "a"}' if name.endswith("json") else "a" if name.lower().endswith("txt") else name
        for name in files
    }
    source = opened(write_tar(tmp_path / "s.tar", content))
    found = samples(source)
    assert [(s.name, s.text, s.data) for s in found] == [(f"s.tar: {n}", "a", n.encode()) for n in rows]
    assert left_out(source) == {f"s.tar: {name}": "other_member" for name in rest}
    for row in range(len(all_samples(source))):
        assert [s.row for s in source.read(source.pieces[0], {row})] == [row]


def test_pictures_of_one_key_without_captions_of_their_own_are_set_aside(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"x.0.png": picture(0), "x.1.png": picture(1), "x.txt": "a"}
    assert problems(opened(write_tar(tmp_path / "s.tar", files))) == {
        "s.tar: x.txt": "missing_file",
        "s.tar: x.0.png": "missing_caption",
        "s.tar: x.1.png": "missing_caption",
    }


def test_tar_samples_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "no-text.png": picture(),
        "empty.png": picture(),
        "empty.txt": "\n",
        "latin.png": picture(),
        "latin.txt": b"caf\xe9",
        "latin-json.png": picture(),
        "latin-json.json": b'{"text": "caf\xe9"}',
        "half.png": picture(),
        "half.json": '{"text": "\\ud83d"}',
        "number.png": picture(),
        "number.json": '{"text": 5}',
        "broken-json.png": picture(),
        "broken-json.json": "{",
        "list.png": picture(),
        "list.json": "[]",
        "no-picture.txt": "a",
    }
    assert problems(opened(write_tar(tmp_path / "s.tar", files))) == {
        "s.tar: no-text.png": "missing_caption",
        "s.tar: empty.png": "empty_caption",
        "s.tar: latin.png": "caption_not_utf8",
        "s.tar: latin-json.png": "caption_not_utf8",
        "s.tar: half.png": "caption_not_utf8",
        "s.tar: number.png": "missing_caption",
        "s.tar: broken-json.png": "missing_caption",
        "s.tar: list.png": "missing_caption",
        "s.tar: no-picture.txt": "missing_file",
    }


def test_links_in_a_tar_are_no_parts_of_samples(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"a.png": picture(), "a.txt": "a"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    assert problems(opened(path)) == {"s.tar: a.png": ""}
    assert left_out(opened(path)) == {"s.tar: b.png": "unusable_link"}


@pytest.mark.parametrize("damage", ["cut in a header", "cut in a file", "cut between files", "overwritten"])
def test_a_damaged_tar_yields_what_precedes_the_damage_and_says_so(tmp_path: Path, damage: str) -> None:
    path = one_tar(tmp_path)
    content = bytearray(path.read_bytes())
    third = content.index(b"00002.png")
    if damage == "overwritten":
        content[third : third + 512] = b"x" * 512
    else:
        del content[third + {"cut in a header": 100, "cut in a file": 520, "cut between files": 0}[damage] :]
    path.write_bytes(content)
    source = opened(path)
    assert list(problems(source).items()) == [
        ("shard-1.tar: 00000.png", ""),
        ("shard-1.tar: 00001.png", ""),
        ("shard-1.tar: after 2 samples", "broken_shard"),
    ]
    assert [s.row for s in source.read(source.pieces[0], {2})] == [2]
    assert not list(source.read(source.pieces[0], {3}))


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_a_file_that_is_no_tar_is_one_broken_shard(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    assert problems(opened(tmp_path)) == {"s.tar: after 0 samples": "broken_shard"}


def test_a_tar_is_streamed_a_sample_at_a_time(tmp_path: Path) -> None:
    size = 1 << 20
    files: dict[str, bytes | str] = {f"{n}.png": bytes(size) for n in range(40)}
    source = opened(write_tar(tmp_path / "s.tar", files), caption_column="text")
    tracemalloc.start()
    assert sum(1 for _ in source.read(source.pieces[0])) == 40
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * size
