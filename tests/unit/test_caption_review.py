"""Captions corrected on the page or in another program: where they are saved, and what comes back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from ray_jobs.captions import main
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.data.sources.captions import OptionalCaptions
from ray_jobs.review.app import PAGE_ROWS, Review, create_app
from ray_jobs.review.captions import METADATA, Captions, open_captions
from ray_jobs.review.export import export
from tests.unit.test_sources import (
    csv_folder,
    dreambooth,
    label_studio,
    lines,
    opened,
    picture,
    samples,
    tar_files,
    write,
)

HOST = "http://127.0.0.1:8300"


def configured(source: Path | str, *overrides: str) -> Config:
    settings = [] if not source else [f"data.source={source}"]
    storage = f"storage={Path(source).parent / 'runs'}" if source else "name=demo"
    return load_config(Path("configs/demo.yaml"), [*settings, storage, *overrides])


def described(folder: Path, number: int = 3) -> Path:
    rows = [{"file_name": f"{n}.png", "class": "x", "text": f"a {n}"} for n in range(number)]
    return write(folder, {METADATA: lines(rows), **{f"{n}.png": picture(n) for n in range(number)}})


def found(captions: Captions) -> list[tuple[str, str]]:
    return [(item.name, item.text) for item in captions.items]


def read(folder: Path, **settings: Any) -> list[tuple[str, str]]:
    source = opened(folder, captions=OptionalCaptions(), **settings)
    return [(sample.name, sample.text) for sample in samples(source)]


def test_a_correction_changes_its_line_of_the_metadata_and_no_other(tmp_path: Path) -> None:
    folder = described(tmp_path / "set")
    write(
        folder,
        {"more/metadata.jsonl": '{"file_name": "9.png", "caption": "nine"}\r\n', "more/9.png": picture(9)},
    )
    before = (folder / METADATA).read_text().splitlines()
    (folder / METADATA).write_text("\ufeff" + "\n\n".join(before))
    captions = open_captions(configured(folder))
    captions.require_editable()
    assert found(captions) == [("0.png", "a 0"), ("1.png", "a 1"), ("2.png", "a 2"), ("more/9.png", "nine")]
    captions.save(captions.items[1], "a\u2028 dog's “ball”")
    captions.save(captions.items[3], "a bee")
    lines_now = (folder / METADATA).read_text().split("\n")
    assert lines_now == [before[0], "", lines_now[2], "", before[2], ""]
    assert json.loads(lines_now[2]) == {"file_name": "1.png", "class": "x", "text": "a\u2028 dog's “ball”"}
    assert json.loads((folder / "more" / METADATA).read_text()) == {"file_name": "9.png", "caption": "a bee"}
    assert read(folder) == found(captions) == found(open_captions(configured(folder)))
    assert captions.is_current()


def test_pictures_without_metadata_get_one_at_the_first_correction(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "set", {"a.png": picture(0), "b.JPG": picture(1), "b.txt": "a bee\n", "c.png": b"x"}
    )
    captions = open_captions(configured(folder))
    captions.require_editable()
    assert found(captions) == [("a.png", ""), ("b.JPG", "a bee"), ("c.png", "")]
    captions.save(captions.items[0], "an ant")
    captions.save(captions.items[2], "a cow")
    rows = [json.loads(line) for line in (folder / METADATA).read_text().splitlines()]
    assert [(row["file_name"], row["text"]) for row in rows] == found(captions)
    assert read(folder)[:2] == [("a.png", "an ant"), ("b.JPG", "a bee")]


@pytest.mark.parametrize("name", [METADATA, "a.txt"])
def test_a_correction_of_what_was_changed_meanwhile_is_refused_and_nothing_lost(
    tmp_path: Path, name: str
) -> None:
    folder = described(tmp_path / "set") if name == METADATA else tmp_path / "set"
    write(folder, {"a.png": picture(5), name: (folder / name).read_text() if name == METADATA else "an ant"})
    captions = open_captions(configured(folder))
    changed = (folder / name).read_text().replace("a 2", "two") + (" more" if name != METADATA else "")
    (folder / name).write_text(changed)
    with pytest.raises(ConfigError, match="changed meanwhile; reload the page, and edit the caption again"):
        captions.save(captions.items[0], "a dog")
    assert (folder / name).read_text() == changed
    assert captions.items[0].text == "a 0" if name == METADATA else not (folder / METADATA).exists()
    again = open_captions(configured(folder))
    again.save(again.items[0], "a dog")
    assert read(folder)[0][1] == "a dog"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (csv_folder, "its captions are in metadata.csv, which is not changed; export them"),
        (label_studio, "its captions are in project-1-at-2026-01-02.json, which is not changed"),
        (dreambooth, "all its pictures have the caption 'a photo of sks dog', the instance_prompt"),
        (tar_files, "lie in tables or tar files"),
    ],
)
def test_captions_that_are_kept_elsewhere_are_not_edited(tmp_path: Path, kind: Any, message: str) -> None:
    folder = kind(tmp_path / "set")
    with pytest.raises(ConfigError, match=message):
        open_captions(configured(folder)).require_editable()
    if kind is csv_folder:  # as the error says
        out = tmp_path / METADATA
        export(configured(folder), open_captions(configured(folder)), METADATA, str(out))
        before = read(folder)
        (folder / "metadata.csv").unlink()
        out.rename(folder / METADATA)
        assert read(folder) == before
        open_captions(configured(folder)).require_editable()


# Export


def corrected(task: dict[str, Any], text: str) -> dict[str, Any]:
    """The task as Label Studio exports it after somebody changed its caption."""
    [guess] = task["predictions"]
    [result] = guess["result"]
    value = {"value": {"text": [text]}, "id": "ab", "origin": "prediction-changed"}
    annotation = {"result": [result | value], "was_cancelled": False, "updated_at": "2026-01-01T00:00:00Z"}
    return task | {"id": 1, "annotations": [annotation], "predictions": [guess]}


def test_what_is_corrected_in_label_studio_comes_back(tmp_path: Path) -> None:
    folder = described(tmp_path / "set")
    rows: list[dict[str, Any]] = [
        {"file_name": "0.png", "text": "one", "class": "x"},
        {"file_name": "0.png", "text": "two", "class": "x"},
        {"file_name": "sub dir/c+d%.png", "text": "three", "class": "y"},
        {"file_name": "1.png", "text": None, "class": "y"},
    ]
    write(folder, {METADATA: lines(rows), "sub dir/c+d%.png": picture(7)})
    out, config = tmp_path / "tasks.json", configured(folder, "data.stratify=class")
    said = export(config, open_captions(config), "label-studio", str(out))
    assert f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={tmp_path}" in said[1] and str(folder) in said[2]
    tasks = json.loads(out.read_text())
    assert [task["data"]["image"] for task in tasks] == [
        "/data/local-files/?d=set/0.png",
        "/data/local-files/?d=set/sub%20dir/c%2Bd%25.png",
        "/data/local-files/?d=set/1.png",
    ]
    assert read(folder, annotations=str(out)) == [(row["file_name"], row["text"] or "") for row in rows]
    source = opened(folder, "class", annotations=str(out), captions=OptionalCaptions())
    assert [sample.stratum for sample in samples(source)] == ["x", "x", "y", "y"]
    back = write(tmp_path, {"back.json": json.dumps([tasks[0], corrected(tasks[1], "drei"), tasks[2]])})
    assert read(folder, annotations=str(back / "back.json"))[2] == ("sub dir/c+d%.png", "drei")
    again = [
        "--config",
        "configs/demo.yaml",
        "--set",
        f"data.source={folder}",
        "--export",
        "label-studio",
        str(out),
    ]
    assert main(again) == 2
    export(config, open_captions(config), "label-studio", str(tmp_path / "up.json"), str(tmp_path.parent))
    assert f"?d={tmp_path.name}/set/0.png" in (tmp_path / "up.json").read_text()
    with pytest.raises(ConfigError, match="--root: .*/set/0.png is not below it; give a folder above"):
        export(
            config, open_captions(config), "label-studio", str(tmp_path / "no.json"), str(tmp_path / "other")
        )


def test_what_is_corrected_in_labelbox_comes_back(tmp_path: Path) -> None:
    folder, out = described(tmp_path / "set"), tmp_path / "rows.ndjson"
    config = configured(folder, "name=cats")
    assert "3 data rows" in export(config, open_captions(config), "labelbox", str(out))[0]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    labels = [json.loads(line) for line in (tmp_path / "rows-labels.ndjson").read_text().splitlines()]
    assert rows[1] == {"row_data": f"{folder}/1.png", "global_key": "cats/1.png", "media_type": "IMAGE"}
    assert labels[1] == {"name": "caption", "answer": "a 1", "dataRow": {"globalKey": "cats/1.png"}}
    exported = [
        {
            "data_row": {"id": "c", "global_key": row["global_key"], "row_data": "https://host/upload-77"},
            "projects": {
                "p": {
                    "labels": [
                        {
                            "annotations": {
                                "classifications": [
                                    {"name": label["name"], "text_answer": {"content": f"{label['answer']}!"}}
                                ]
                            }
                        }
                    ]
                }
            },
        }
        for row, label in zip(rows, labels, strict=True)
    ]
    back = write(tmp_path, {"back.ndjson": lines(exported)}) / "back.ndjson"
    assert read(folder, annotations=str(back)) == [(f"{n}.png", f"a {n}!") for n in range(3)]


@pytest.mark.parametrize(
    ("format_", "root", "message"),
    [
        ("csv", None, "--export: csv: unknown; give label-studio"),
        ("labelbox", "x", "--root: x changes nothing"),
    ],
)
def test_exports_that_cannot_be_are_refused(tmp_path: Path, format_: str, root: str, message: str) -> None:
    config = configured(described(tmp_path / "set"))
    with pytest.raises(ConfigError, match=message):
        export(config, open_captions(config), format_, str(tmp_path / "out"), root)


# The page's application


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"file_name": f"{n:02d}.png", "text": f"a {n}"} for n in range(PAGE_ROWS + 2)]
    rows[3]["text"], rows[4]["text"], rows[5]["text"] = "", "The  same", "the same"
    pictures: dict[str, bytes | str] = {str(row["file_name"]): picture(0) for row in rows}
    return write(tmp_path / "set", {METADATA: lines(rows), **pictures, "07.png": b"broken"})


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    with TestClient(create_app(Review(configured(folder))), base_url=HOST) as client:
        yield client


def put(client: TestClient, number: int, text: str, before: str, **headers: str) -> Any:
    edit = {"text": text, "before": before}
    return client.put(f"/captions/{number}", json=edit, headers={"origin": HOST} | headers)


def test_captions_come_in_pages_by_filter(client: TestClient) -> None:
    def numbers(**query: Any) -> list[int]:
        return [item["number"] for item in client.get("/captions", params=query).json()["items"]]

    first = client.get("/captions").json()
    assert first["counts"] == {"all": PAGE_ROWS + 2, "empty": 1, "duplicate": 2, "edited": 0}
    assert (first["page"], first["pages"]) == (0, 2) and len(first["items"]) == PAGE_ROWS
    assert numbers(page=1) == numbers(page=9) == [PAGE_ROWS, PAGE_ROWS + 1]
    assert (numbers(show="empty"), numbers(show="duplicate")) == ([3], [4, 5])
    assert numbers(find="SAME") == [4, 5] and numbers(find="07.PNG") == [7]
    assert client.get("/captions", params={"show": "other"}).status_code == 422


def test_pictures_are_jpeg_and_kept_by_the_browser_until_they_change(client: TestClient) -> None:
    answer = client.get("/pictures/0")
    assert answer.content.startswith(b"\xff\xd8") and answer.headers["content-type"] == "image/jpeg"
    tag = {"if-none-match": answer.headers["etag"]}
    assert client.get("/pictures/0", headers=tag).status_code == 304
    assert client.get("/pictures/0?whole=true", headers=tag).status_code == 200
    assert client.get("/pictures/7").status_code == client.get("/pictures/99").status_code == 404


def test_a_caption_is_saved_once_and_only_over_the_one_that_was_shown(
    client: TestClient, folder: Path
) -> None:
    assert put(client, 0, " a cat ", "a 0").json() == {"text": "a cat"}
    assert read(folder)[0] == ("00.png", "a cat")
    assert client.get("/captions?show=edited").json()["items"][0]["text"] == "a cat"
    stale = put(client, 0, "a dog", "a 0")
    assert stale.status_code == 409 and "is now 'a cat'; reload the page" in stale.json()["detail"]
    (folder / METADATA).write_text((folder / METADATA).read_text().replace("a 2", "two"))
    assert put(client, 1, "a dog", "a 1").status_code == 409
    assert client.get("/").status_code == 200  # a reload reads the file again
    assert put(client, 1, "a dog", "a 1").status_code == 200
    assert [text for _, text in read(folder)[:3]] == ["a cat", "a dog", "two"]
    assert put(client, 0, "  ", "a cat").status_code == 422


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"content-type": "text/plain"},
        {"host": "evil.example:8300", "origin": "http://evil.example:8300"},
    ],
)
def test_another_page_cannot_change_a_caption(
    client: TestClient, folder: Path, headers: dict[str, str]
) -> None:
    assert put(client, 0, "a dog", "a 0", **headers).status_code == 403
    assert read(folder)[0] == ("00.png", "a 0")
    assert client.put("/captions/0", json={"text": "a dog", "before": "a 0"}).status_code == 403
    assert client.get("/captions", headers={"host": "evil.example"}).status_code == 403
    tunnel = {"host": "localhost:1234", "origin": "http://localhost:1234"}
    assert put(client, 0, "a dog", "a 0", **tunnel).status_code == 200


def test_the_command_names_what_is_wrong_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "configs/demo.yaml", "--set", f"data.source={described(tmp_path / 'set')}"]
    assert main([*arguments, "--export", "metadata.jsonl", str(tmp_path / "out.jsonl")]) == 0
    assert "wrote 3 lines" in capsys.readouterr().out
    for wrong in (["--review", "--root", "x"], ["--export", "labelbox", "x", "--port", "1"], []):
        with pytest.raises(SystemExit):
            main([*arguments, *wrong])
