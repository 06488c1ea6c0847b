"""Folders of pictures: which captions belong to them, and what is wrong with those that are set aside."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_jobs.config import ConfigError
from ray_jobs.data.sources.dreambooth import Subject
from ray_jobs.data.sources.folders import ROWS_A_PIECE
from tests.unit.test_sources import (
    caption_files,
    csv_folder,
    dreambooth,
    image_folder,
    lines,
    opened,
    parquet_files,
    picture,
    problems,
    samples,
    tar_files,
    write,
)

# metadata.jsonl and metadata.csv


def test_an_image_folder_yields_captions_strata_and_pieces_of_128_rows(tmp_path: Path) -> None:
    source = opened(image_folder(tmp_path), stratify="place")
    assert [piece.name for piece in source.pieces] == [
        "metadata.jsonl: rows 1-128",
        "metadata.jsonl: rows 129-130",
    ]
    last = samples(source)[-1]
    assert (last.row, last.name, last.text) == (1, "photos/129.png", "a 129")
    assert (last.data, last.stratum, last.role) == (picture(129), "sea", "instance")


def test_a_piece_carries_its_own_rows_only(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.png", "text": "x" * 100} for n in range(20 * ROWS_A_PIECE)]
    source = opened(write(tmp_path, {"metadata.jsonl": lines(rows)}))
    assert len(source.pieces) == 20
    assert all(len(pickle.dumps(piece)) < 200 * ROWS_A_PIECE for piece in source.pieces)
    assert len(pickle.dumps(source.reader())) < 1000


def test_a_csv_may_quote_commas_and_hold_any_line_separator(tmp_path: Path) -> None:
    found = samples(opened(csv_folder(tmp_path)))
    assert [(s.name, s.text) for s in found] == [("a.png", "a cat, sitting"), ("b.png", "a\u2028dog")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"file": "a.png", "text": "a"}', "line 1: field 'file_name' is missing (found: file, text)"),
        ('{"file_name": "a.png", "words": "a"}', "line 1: field 'text' is missing"),
        ('{"file_name": "a.png", "text": 5}', "line 1: field 'text' must be a text, not 5"),
        ('{"file_name": "a.png", "text": 0}', "line 1: field 'text' must be a text, not 0"),
        ('\n{"file_name": null, "text": "a"}', "line 2: field 'file_name' must be a text, not None"),
        ("file_name,text", "line 1: not JSON"),
        ("[1]", "line 1: not an object"),
        ("", "has no lines"),
    ],
)
def test_wrong_captions_name_file_line_and_field(tmp_path: Path, line: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(write(tmp_path, {"metadata.jsonl": line}))
    assert expected in str(caught.value) and "metadata.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("name,text\na.png,a\n", "line 2: field 'file_name' is missing (found: name, text)"),
        ("file_name,text\na.png,a cat, sitting\n", "line 2: more values than the header has columns"),
        ('file_name,text\na.png,"a cat\nb.png,b\n', "not CSV (unexpected end of data)"),
        ("file_name,text\n", "has no lines"),
    ],
)
def test_a_wrong_csv_names_file_line_and_fix(tmp_path: Path, content: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(write(tmp_path, {"metadata.csv": content}))
    assert expected in str(caught.value) and "metadata.csv" in str(caught.value)


def test_a_column_to_stratify_by_must_be_there(tmp_path: Path) -> None:
    write(tmp_path, {"metadata.jsonl": '{"file_name": "a.png", "text": "a"}'})
    with pytest.raises(ConfigError, match="line 1: field 'place' is missing .* correct data.stratify"):
        opened(tmp_path, stratify="place")


def test_rows_of_an_image_folder_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {"good.png": picture(), "..good.png": picture(), "sub/a.png": picture()})
    write(tmp_path, {"secret.png": picture(7), "secrets/b.png": picture(7)})
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path / "secrets")
    (folder / "inside.png").symlink_to(folder / "good.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    os.mkfifo(folder / "pipe.png")
    expected = {
        "good.png": "",
        "..good.png": "",
        "sub/../sub/a.png": "",
        "inside.png": "",
        "gone.png": "missing_file",
        "../secret.png": "outside_folder",
        "sub/../../secret.png": "outside_folder",
        str(tmp_path / "secret.png"): "outside_folder",
        "..\\secret.png": "outside_folder",
        "C:\\secret.png": "outside_folder",
        "link.png": "outside_folder",
        "linked/b.png": "outside_folder",
        "self.png": "unreadable",
        "sub": "unreadable",
        "pipe.png": "unreadable",
        "nul\0.png": "unreadable",
    }
    rows = [{"file_name": name, "text": "a"} for name in expected]
    source = opened(write(folder, {"metadata.jsonl": lines(rows)}))
    assert problems(source) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"null", "missing_caption"),
        (b'" \\n"', "empty_caption"),
        (b'"caf\xe9"', "caption_not_utf8"),
        (b'"half a pair: \\ud83d"', "caption_not_utf8"),
    ],
)
def test_a_caption_that_cannot_be_used_sets_its_row_aside_alone(
    tmp_path: Path, text: bytes, reason: str
) -> None:
    metadata = b'{"file_name": "a.png", "text": %s}\n{"file_name": "b.png", "text": "caf\xc3\xa9"}\n' % text
    source = opened(write(tmp_path, {"metadata.jsonl": metadata, "a.png": picture(), "b.png": picture()}))
    assert problems(source) == {"a.png": reason, "b.png": ""}
    assert [sample.text for sample in samples(source)] == ["", "café"]


def test_captions_of_a_csv_are_judged_alike(tmp_path: Path) -> None:
    metadata = b"file_name,text\na.png\nb.png,\nc\xe9.png,c\nd.png,caf\xe9\n"
    source = opened(write(tmp_path, {"metadata.csv": metadata}))
    assert problems(source) == {
        "a.png": "missing_caption",
        "b.png": "empty_caption",
        "c\N{REPLACEMENT CHARACTER}.png": "caption_not_utf8",
        "d.png": "caption_not_utf8",
    }


def test_a_changed_caption_changes_the_digest_of_its_piece_alone(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    before = [piece.digest for piece in opened(folder).pieces]
    metadata = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(metadata.replace('"a 129"', '"b 129"'))
    after = [piece.digest for piece in opened(folder).pieces]
    assert before[0] == after[0] and before[1] != after[1]


def test_a_picture_behind_a_linked_folder_counts_in_the_digest(tmp_path: Path) -> None:
    write(tmp_path, {"metadata.jsonl": lines([{"file_name": "linked/a.png", "text": "a"}])})
    write(tmp_path, {"real/a.png": picture(0)})
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    before = opened(tmp_path)
    assert samples(before)[0].data == picture(0)
    os.utime(tmp_path / "real/a.png", ns=(0, 1))
    assert opened(tmp_path).digest != before.digest


# Caption files and DreamBooth


def test_caption_files_lie_beside_their_pictures(tmp_path: Path) -> None:
    found = samples(opened(caption_files(tmp_path)))
    assert [(s.name, s.text, s.data) for s in found] == [
        ("b.JPG", "a bee", picture(1)),
        ("more/a.png", "an ant", picture(0)),
    ]


def test_caption_files_that_cannot_be_used_are_told_apart(tmp_path: Path) -> None:
    caption_files(tmp_path)
    write(tmp_path, {f"{name}.png": picture() for name in ("none", "empty", "latin", ".hidden")})
    write(tmp_path, {"empty.txt": " \n", "latin.txt": b"caf\xe9", "notes.txt": "no picture"})
    assert problems(opened(tmp_path)) == {
        "b.JPG": "",
        "empty.png": "empty_caption",
        "latin.png": "caption_not_utf8",
        "more/a.png": "",
        "none.png": "missing_caption",
    }


def test_a_changed_caption_file_changes_the_digest(tmp_path: Path) -> None:
    before = opened(caption_files(tmp_path)).digest
    (tmp_path / "b.txt").write_text("a wasp")
    assert opened(tmp_path).digest != before


def test_dreambooth_gives_instance_and_class_pictures_their_prompts(tmp_path: Path) -> None:
    write(dreambooth(tmp_path), {"other/a.png": picture()})
    found = [(s.name, s.role, s.text) for s in samples(opened(tmp_path))]
    instances = [(f"{n}.png", "instance", "a photo of sks dog") for n in range(4)]
    assert found == instances + [(f"class_data_dir/{n}.jpeg", "class", "a photo of a dog") for n in range(2)]


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        ("{}", "'instance_prompt' is missing"),
        ('{"instance_prompt": " "}', "'instance_prompt' must be a text and not empty"),
        ('{"instance_prompt": "a", "steps": 5}', "unknown key 'steps'"),
        ('{"instance_prompt": "a"}', "'class_prompt' is missing; the pictures in class_data_dir/"),
    ],
)
def test_a_wrong_dataset_info_names_the_key(tmp_path: Path, info: str, expected: str) -> None:
    write(dreambooth(tmp_path), {"dataset_info.json": info})
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path)
    assert f"dataset_info.json: {expected}" in str(caught.value)


def test_dreambooth_needs_pictures_of_the_subject(tmp_path: Path) -> None:
    for file in dreambooth(tmp_path).glob("*.png"):
        file.unlink()
    with pytest.raises(ConfigError, match="no picture of the subject; put some directly into the folder"):
        opened(tmp_path)


def test_prompts_of_the_configuration_need_no_file_beside_the_pictures(tmp_path: Path) -> None:
    write(tmp_path, {"a.webp": picture(0), "class_data_dir/b.png": picture(1), "other/c.png": picture(2)})
    source = opened(tmp_path, instance_prompt=" a photo of sks cat ", class_prompt="a photo of a cat")
    assert isinstance(source, Subject)
    assert (source.class_prompt, source.num_class_pictures) == ("a photo of a cat", 1)
    assert [(s.name, s.role, s.text) for s in samples(source)] == [
        ("a.webp", "instance", "a photo of sks cat"),
        ("class_data_dir/b.png", "class", "a photo of a cat"),
    ]


def test_a_class_prompt_of_the_configuration_completes_a_dataset_info(tmp_path: Path) -> None:
    write(dreambooth(tmp_path), {"dataset_info.json": '{"instance_prompt": "a photo of sks dog"}'})
    texts = {sample.role: sample.text for sample in samples(opened(tmp_path, class_prompt="a dog"))}
    assert texts == {"instance": "a photo of sks dog", "class": "a dog"}


@pytest.mark.parametrize("key", ["instance_prompt", "class_prompt"])
def test_a_prompt_that_is_given_twice_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is set here and in data.sources; remove one"):
        opened(dreambooth(tmp_path), **{key: "a photo of sks dog"})


def test_a_class_prompt_without_an_instance_prompt_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture()})
    with pytest.raises(ConfigError, match="has a class_prompt in data.sources but no instance_prompt"):
        opened(tmp_path, class_prompt="a cat")


def test_class_pictures_without_a_class_prompt_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(0), "class_data_dir/b.png": picture(1)})
    with pytest.raises(ConfigError, match="'class_prompt' is missing; the pictures in class_data_dir/"):
        opened(tmp_path, instance_prompt="a sks cat")


@pytest.mark.parametrize("kind", [image_folder, csv_folder, caption_files, parquet_files, tar_files])
def test_a_folder_with_captions_refuses_an_instance_prompt(
    tmp_path: Path, kind: Callable[[Path], Path]
) -> None:
    with pytest.raises(
        ConfigError, match="has captions .* and also an instance_prompt in data.sources; remove"
    ):
        opened(kind(tmp_path), instance_prompt="a sks cat")
