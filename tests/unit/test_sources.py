"""Every kind of source yields its pictures in order, says what is wrong with a row, tells when it changed."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.config import ConfigError, SourceConfig
from ray_jobs.data.sources.captions import AS_WRITTEN
from ray_jobs.data.sources.detection import open_source
from ray_jobs.data.sources.folders import ROWS_A_PIECE
from ray_jobs.data.sources.samples import LEFT_OUT, Sample, Source


def picture(number: int = 0) -> bytes:
    """The file of a small picture, another one for every number."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_tar(path: Path, files: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 4, **columns: Any) -> Path:
    """`columns` gives the types of those that Arrow would guess wrongly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array([row[name] for row in rows], columns.get(name)) for name in rows[0]})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def image_folder(folder: Path) -> Path:
    rows = [
        {"file_name": f"photos/{n}.png", "text": f"a {n}", "place": "sea"} for n in range(ROWS_A_PIECE + 2)
    ]
    pictures: dict[str, bytes | str] = {f"photos/{n}.png": picture(n) for n in range(ROWS_A_PIECE + 2)}
    return write(folder, {"metadata.jsonl": lines(rows), **pictures})


def csv_folder(folder: Path) -> Path:
    text = '\N{BYTE ORDER MARK}file_name,text\r\na.png,"a cat, sitting"\r\nb.png,a\u2028dog\r\n'
    return write(folder, {"metadata.csv": text, "a.png": picture(0), "b.png": picture(1)})


def caption_files(folder: Path) -> Path:
    return write(
        folder,
        {"b.JPG": picture(1), "b.txt": "a bee\n", "more/a.png": picture(0), "more/a.txt": "an ant"},
    )


def label_studio(folder: Path) -> Path:
    """A project whose pictures were on Label Studio's own disk, below a root above them."""
    tasks = [
        {
            "id": 7 + n,
            "data": {"image": f"/data/local-files/?d=here/photos/{n}%20of%203.png"},
            "annotations": [
                {"result": [{"type": "textarea", "from_name": "words", "value": {"text": [f"a {n}"]}}]}
            ],
        }
        for n in range(3)
    ]
    pictures: dict[str, bytes | str] = {f"photos/{n} of 3.png": picture(n) for n in range(3)}
    return write(folder, {"project-1-at-2026-01-02.json": json.dumps(tasks), **pictures})


def labelbox(folder: Path) -> Path:
    rows = [
        {
            "data_row": {
                "id": f"c{n}",
                "external_id": f"{n}.png",
                "row_data": f"https://host/u/{n}?Expires=1",
            },
            "projects": {
                "p": {
                    "labels": [
                        {
                            "annotations": {
                                "classifications": [{"name": "words", "text_answer": {"content": f"a {n}"}}]
                            }
                        }
                    ]
                }
            },
        }
        for n in range(3)
    ]
    return write(folder, {"export.ndjson": lines(rows), **{f"{n}.png": picture(n) for n in range(3)}})


def dreambooth(folder: Path) -> Path:
    prompts = {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
    pictures: dict[str, bytes | str] = {f"{n}.png": picture(n) for n in range(4)}
    pictures |= {f"class_data_dir/{n}.jpeg": picture(9 + n) for n in range(2)}
    return write(folder, {"dataset_info.json": json.dumps(prompts), **pictures})


def parquet_files(folder: Path) -> Path:
    rows = [{"image": {"bytes": picture(n), "path": f"{n}.png"}, "text": f"a {n}"} for n in range(6)]
    write_parquet(folder / "data" / "a.parquet", rows)
    write_parquet(folder / "data" / "b.parquet", rows[:2])
    return folder


def tar_files(folder: Path) -> Path:
    for shard in range(2):
        files: dict[str, bytes | str] = {}
        for n in range(3):
            files |= {f"{n:05d}.png": picture(10 * shard + n), f"{n:05d}.txt": f"a {shard} {n}"}
        write_tar(folder / f"shard-{shard}.tar", files)
    return folder


def one_parquet(folder: Path) -> Path:
    return parquet_files(folder) / "data" / "a.parquet"


def one_tar(folder: Path) -> Path:
    return tar_files(folder) / "shard-1.tar"


KINDS: list[Callable[[Path], Path]] = [
    image_folder,
    csv_folder,
    caption_files,
    label_studio,
    labelbox,
    dreambooth,
    parquet_files,
    tar_files,
    one_parquet,
    one_tar,
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def opened(path: Path | str, stratify: str | None = None, **settings: Any) -> Source:
    """Args: settings: of the source; and `captions`."""
    captions = settings.pop("captions", AS_WRITTEN)
    return open_source(SourceConfig(path=str(path), **settings), stratify, captions)


def all_samples(source: Source) -> list[Sample]:
    return [sample for piece in source.pieces for sample in source.read(piece)]


def samples(source: Source) -> list[Sample]:
    """The rows of the set."""
    return [s for s in all_samples(source) if not s.problem or s.problem.reason not in LEFT_OUT]


def left_out(source: Source) -> dict[str, str]:
    """Name -> reason of the files that are no rows; of those that are no pictures, their counts."""
    found = [(s.name, s.problem) for s in all_samples(source)]
    return {
        name: problem.detail if problem.reason == "no_picture" else problem.reason
        for name, problem in found
        if problem and problem.reason in LEFT_OUT
    }


def facts(sample: Sample) -> dict[str, Any]:
    """What of a sample can be compared: exceptions with the same words are not equal."""
    return vars(sample) | {"problem": repr(sample.problem)}


def problems(source: Source) -> dict[str, str]:
    """Name -> reason, "" for a sample without a problem; also that a problem leaves no bytes."""
    found = samples(source)
    assert all(bool(sample.data) != bool(sample.problem) for sample in found)
    return {sample.name: sample.problem.reason if sample.problem else "" for sample in found}


@every_kind
def test_samples_come_whole_and_in_order(tmp_path: Path, kind: Callable[[Path], Path]) -> None:
    source = opened(kind(tmp_path))
    found = samples(source)
    assert found and not [sample.problem for sample in found if sample.problem]
    assert all(sample.data.startswith(b"\x89PNG") and sample.text for sample in found)
    assert len({sample.name for sample in found}) == len(found)
    assert source.num_rows in (None, len(found))
    assert [piece.number for piece in source.pieces] == list(range(len(source.pieces)))
    for piece in source.pieces:
        assert [s.row for s in source.read(piece)] == list(range(len(list(source.read(piece)))))


@every_kind
def test_wanted_rows_alone_are_read_with_their_numbers(tmp_path: Path, kind: Callable[[Path], Path]) -> None:
    source = opened(kind(tmp_path))
    whole = [facts(sample) for sample in source.read(source.pieces[0])]
    assert [facts(sample) for sample in source.read(source.pieces[0], {1, 10**6})] == whole[1:2]
    assert not list(source.read(source.pieces[0], frozenset()))


@every_kind
def test_a_pickled_reader_reads_pickled_pieces(tmp_path: Path, kind: Callable[[Path], Path]) -> None:
    source = opened(kind(tmp_path))
    reader: Source = pickle.loads(pickle.dumps(source.reader()))
    assert not reader.pieces
    read = [s for piece in source.pieces for s in reader.read(pickle.loads(pickle.dumps(piece)))]
    assert [facts(sample) for sample in read] == [facts(sample) for sample in samples(source)]


@every_kind
def test_digests_tell_pieces_apart_and_stay_while_nothing_changes(
    tmp_path: Path, kind: Callable[[Path], Path]
) -> None:
    path = kind(tmp_path)
    source = opened(path)
    assert len({piece.digest for piece in source.pieces}) == len(source.pieces)
    assert opened(path).digest == source.digest
    assert [piece.digest for piece in opened(path).pieces] == [piece.digest for piece in source.pieces]


@every_kind
def test_a_changed_file_changes_the_digest_of_its_piece_alone(
    tmp_path: Path, kind: Callable[[Path], Path]
) -> None:
    path = kind(tmp_path)
    source = opened(path)
    name = samples(source)[0].name.partition(":")[0]
    file = path if path.is_file() else path / name
    os.utime(file, ns=(0, 1))
    before, after = ([piece.digest for piece in each.pieces] for each in (source, opened(path)))
    assert opened(path).digest != source.digest
    other_files = [n for n, piece in enumerate(source.pieces) if not piece.name.startswith(name) and n]
    assert before[0] != after[0] and all(before[n] == after[n] for n in other_files)


def test_sources_at_other_places_share_no_digest(tmp_path: Path) -> None:
    one, two = (opened(tar_files(tmp_path / name)) for name in ("one", "two"))
    assert not {piece.digest for piece in one.pieces} & {piece.digest for piece in two.pieces}


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("nowhere", "nowhere.parquet", "nowhere.tar"):
        with pytest.raises(ConfigError, match=f"data.source: .*{name}: no such folder"):
            opened(tmp_path / name)
    write(tmp_path, {"alone.png": picture()})
    with pytest.raises(ConfigError, match="no metadata.jsonl or metadata.csv, .* and no picture with a .txt"):
        opened(tmp_path)


def test_a_relative_path_starts_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caption_files(tmp_path / "set")
    monkeypatch.setenv("DIFFRAY_HOME", str(tmp_path))
    assert opened("set").num_rows == 2


@pytest.mark.parametrize("both", [("metadata.jsonl", "metadata.csv"), ("a.parquet", "b.tar")])
def test_a_folder_of_two_kinds_is_refused(tmp_path: Path, both: tuple[str, str]) -> None:
    write(tmp_path, dict.fromkeys(both, "x"))
    with pytest.raises(ConfigError, match=f"{both[0]} and {both[1]}; remove one"):
        opened(tmp_path)


def test_circles_of_links_end(tmp_path: Path) -> None:
    image_folder(tmp_path)
    for name in "abc":
        (tmp_path / "photos" / name).symlink_to(tmp_path)
        (tmp_path / f"{name}.png").symlink_to(tmp_path / f"{name}.png")
    assert len(samples(opened(tmp_path))) == ROWS_A_PIECE + 2


@pytest.mark.parametrize("kind", [caption_files, dreambooth])
def test_a_source_without_columns_refuses_stratify(tmp_path: Path, kind: Callable[[Path], Path]) -> None:
    with pytest.raises(
        ConfigError, match="data.stratify or data.balance: place: .* has only files, no columns"
    ):
        opened(kind(tmp_path), stratify="place")
