"""Exports of Label Studio (1.x) and Labelbox (v2) as sources: which captions count, to which pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config import ConfigError
from ray_jobs.data.sources.captions import OptionalCaptions
from tests.unit.test_sources import (
    label_studio,
    labelbox,
    left_out,
    lines,
    opened,
    picture,
    problems,
    samples,
    write,
)


def result(*texts: str, name: str = "caption", kind: str = "textarea", **value: Any) -> dict[str, Any]:
    key = "text" if kind == "textarea" else kind
    return {
        "id": "x1",
        "from_name": name,
        "to_name": "image",
        "type": kind,
        "value": {key: list(texts), **value},
    }


def task(image: str, *annotations: dict[str, Any], predictions: Any = (), **data: Any) -> dict[str, Any]:
    """A task as Label Studio exports it, with fields that are not read."""
    return {
        "id": 5,
        "inner_id": 1,
        "file_upload": None,
        "drafts": [],
        "predictions": list(predictions),
        "annotations": list(annotations),
        "data": {"image": image, **data},
        "meta": {},
    }


def annotation(*results: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"id": 1, "completed_by": 1, "result": list(results), "lead_time": 3.1, **settings}


def data_row(name: str, *classifications: dict[str, Any], **label: Any) -> dict[str, Any]:
    """A line as Labelbox exports it, with fields that are not read."""
    annotations = {"objects": [], "classifications": list(classifications), "relationships": []}
    return {
        "data_row": {"id": "clf9", "global_key": name, "row_data": f"https://storage/{name}"},
        "media_attributes": {"height": 8, "width": 8},
        "projects": {
            "cltd": {
                "name": "cats",
                "labels": [
                    {"label_kind": "Default", "version": "1.0.0", "annotations": annotations, **label}
                ],
                "project_details": {"ontology_id": "clt"},
            }
        },
    }


def answer(text: str, name: str = "caption") -> dict[str, Any]:
    return {"feature_id": "f", "name": name, "value": name, "text_answer": {"content": text}}


def export(folder: Path, *entries: dict[str, Any], pictures: int = 2) -> Path:
    """A folder with an export, in the form that belongs to its entries, and pictures."""
    is_labelbox = "data_row" in entries[0]
    files = {"out.ndjson": lines(list(entries))} if is_labelbox else {"out.json": json.dumps(entries)}
    return write(folder, {**files, **{f"{n}.png": picture(n) for n in range(pictures)}})


def captions(path: Path, **settings: Any) -> list[tuple[str, str]]:
    return [(sample.name, sample.text) for sample in samples(opened(path, **settings))]


def test_the_ground_truth_or_the_latest_annotation_counts_and_predictions_only_without_one(
    tmp_path: Path,
) -> None:
    early = annotation(result("early"), updated_at="2026-01-01T10:00:00Z")
    late = annotation(result("late"), updated_at="2026-01-02T10:00:00Z")
    true = annotation(result("true"), ground_truth=True, updated_at="2025-01-02T10:00:00Z")
    skipped = annotation(result("no"), was_cancelled=True)
    guess = {"model_version": "blip", "score": 0.5, "result": [result("guess")]}
    tasks = [
        task("0.png", late, early),
        task("1.png", late, true),
        task("2.png", predictions=[12, guess]),
        task("3.png", skipped, predictions=[guess]),
        task("4.png", annotation(), predictions=[guess]),
    ]
    folder = export(tmp_path, *tasks, pictures=5)
    assert problems(opened(folder)) == {f"{n}.png": "missing_caption" if n > 2 else "" for n in range(5)}
    assert [text for _, text in captions(folder)][:3] == ["late", "true", "guess"]
    optional = opened(folder, captions=OptionalCaptions())
    assert [sample.text for sample in samples(optional)] == ["late", "true", "guess", "", ""]


def test_several_texts_are_captions_of_their_own_and_those_of_regions_none(tmp_path: Path) -> None:
    region = result("an ear", x=10.0, y=5.0, width=20.0, height=20.0)
    folder = export(tmp_path, task("0.png", annotation(region, result("a cat", "it sleeps"))))
    assert captions(folder) == [("0.png", "a cat"), ("0.png", "it sleeps")]
    assert left_out(opened(folder)) == {"1.png": "not_listed"}


@pytest.mark.parametrize(
    ("reference", "file"),
    [
        ("cat.png", "cat.png"),
        ("/data/local-files/?d=photos/a%20b/cat.png", "a b/cat.png"),
        ("http://localhost:8080/data/local-files/?d=root/a b/cat.png", "a b/cat.png"),
        ("s3://bucket/photos/cat.png", "cat.png"),
        ("https://example.com/x/a%20b/cat.png?Expires=1#x", "a b/cat.png"),
        ("/data/upload/3/1f2e3d4c-cat.png", None),
        ("/data/upload/3/1f2e3d4c-dog.png", "dog.png"),
        ("/home/ann/photos/dog.png", "dog.png"),
        (r"C:\photos\a b\cat.png", "a b/cat.png"),
    ],
)
def test_paths_and_urls_lead_to_the_file_that_ends_alike(
    tmp_path: Path, reference: str, file: str | None
) -> None:
    tasks = [task(reference, annotation(result("it"))), task("other.png", annotation(result("another")))]
    folder = export(tmp_path, *tasks, pictures=0)
    write(folder, {name: picture() for name in ("cat.png", "a b/cat.png", "dog.png", "other.png")})
    found = problems(opened(folder))
    assert found.pop("other.png") == ""
    [(name, problem)] = found.items()
    assert (name, problem) == (file, "") if file else problem == "missing_file"


def test_labels_that_were_skipped_or_are_older_do_not_count(tmp_path: Path) -> None:
    early, late = data_row("x/0.png", answer("early")), data_row("x/0.png", answer("late"))
    both = early["projects"]["cltd"]["labels"] + late["projects"]["cltd"]["labels"]
    both[0]["label_details"] = {"created_at": "2024-04-08T16:21:26.000+00:00", "created_by": "a"}
    both[1]["label_details"] = {"created_at": "2024-04-09T16:21:26.000+00:00"}
    early["projects"]["cltd"]["labels"] = both[::-1]
    skipped = data_row("x/1.png", answer("no"), performance_details={"skipped": True})
    folder = export(tmp_path, early, skipped)
    assert problems(opened(folder)) == {"0.png": "", "1.png": "missing_caption"}
    assert captions(folder)[0] == ("0.png", "late")
    whole = write(tmp_path / "array", {"out.json": json.dumps([early]), "0.png": picture()})
    assert captions(whole) == [("0.png", "late")]


def test_choices_and_fields_are_columns_by_which_splits_are_stratified(tmp_path: Path) -> None:
    first = annotation(result("a cat"), result("tabby", kind="choices", name="breed"))
    studio = export(tmp_path / "s", task("0.png", first, place="sea"), task("1.png", annotation(result("b"))))
    assert [sample.stratum for sample in samples(opened(studio, stratify="breed"))] == ["tabby", ""]
    assert [sample.stratum for sample in samples(opened(studio, stratify="place"))] == ["sea", ""]
    radio = {"name": "breed", "value": "breed", "radio_answer": {"name": "tabby", "value": "tabby"}}
    box = export(tmp_path / "b", data_row("0.png", answer("a cat"), radio))
    assert [sample.stratum for sample in samples(opened(box, stratify="breed"))] == ["tabby"]
    with pytest.raises(ConfigError, match="'size' is missing .found: breed.; correct data.stratify"):
        opened(box, stratify="size")


def test_fields_are_chosen_by_name_where_there_are_several(tmp_path: Path) -> None:
    first = annotation(result("short", name="title"), result("long", name="story"))
    folder = export(tmp_path, task("0.png", first))
    with pytest.raises(ConfigError, match="out.json: has texts named story, title; name the captions in"):
        opened(folder)
    assert captions(folder, caption_column="story") == [("0.png", "long")]
    with pytest.raises(ConfigError, match="no captions named 'x' .found: story, title.; correct"):
        opened(folder, caption_column="x")
    renamed = task("", first) | {"data": {"photo": "https://host/0.png", "page": "https://host"}}
    assert captions(export(tmp_path / "b", renamed), caption_column="story") == [("0.png", "long")]
    assert captions(folder, caption_column="story", image_column="image") == [("0.png", "long")]
    with pytest.raises(ConfigError, match=r"task 1: data.file must be the picture's path or URL, not None"):
        opened(folder, image_column="file")


@pytest.mark.parametrize("kind", [label_studio, labelbox])
def test_an_export_is_a_source_by_its_own_name_or_for_a_folder_elsewhere(
    tmp_path: Path, kind: Callable[[Path], Path]
) -> None:
    folder = kind(tmp_path / "set")
    [file] = [each for each in folder.iterdir() if each.suffix in (".json", ".ndjson")]
    inside = captions(folder)
    assert inside == captions(file) and len(inside) == 3
    write(folder, {"metadata.jsonl": lines([{"file_name": name, "text": "old"} for name, _ in inside])})
    with pytest.raises(ConfigError, match=f"because of metadata.jsonl and {file.name}; remove one"):
        opened(folder)
    assert captions(file) == inside
    apart = file.rename(tmp_path / file.name)
    assert captions(folder, annotations=str(apart)) == inside
    assert {text for _, text in captions(folder)} == {"old"}
    with pytest.raises(ConfigError, match="has captions .* and also an instance_prompt"):
        opened(folder, annotations=str(apart), instance_prompt="a cat")
    with pytest.raises(ConfigError, match="gone.json: no such file; correct annotations or path"):
        opened(folder, annotations=str(tmp_path / "gone.json"))


COCO = {"images": [{"file_name": "0.png"}], "annotations": []}
TASK = task("0.png", annotation(result("a")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps([{"image": "0.png", "caption": "a", "id": 1}]),
            "JSON-MIN has not.*found: image, caption",
        ),
        (json.dumps(COCO), "neither a JSON export of Label Studio.*found: images, annotations"),
        (
            json.dumps([{"completions": [], "data": {}}]),
            "task 1: has completions, as Label Studio before 1.0",
        ),
        (
            json.dumps([TASK, {"id": 2}]),
            "task 2: data: Field required .found: id.; export the project as JSON",
        ),
        (json.dumps([TASK | {"annotations": {}}]), "task 1: annotations: Input should be a valid list"),
        (
            json.dumps([task("0.png", annotation(result("a", kind="choices")))]),
            "has no captions, only choices",
        ),
        (
            json.dumps([{"DataRow ID": "c", "Labeled Data": "0.png"}]),
            "data row 1: is of Labelbox's export v1",
        ),
        (lines([data_row("0.png"), {"data_row": {}}]), "data row 2: projects: Field required"),
        (lines([data_row("0.png")]), "has no captions, only pictures; captions are texts of a TextArea in"),
        (lines([data_row("", answer("a")) | {"data_row": {}}]), "data row 1: data_row names no picture"),
        ("[1]", "entry 1: not an object"),
        ("[]", "has no entries"),
        ('{"data_row": {}}\n{', "line 2: not JSON"),
        (b"\xff[]", "byte 0 is not UTF-8"),
        (json.dumps([task("https://host/9.png", annotation(result("a")))]), "none of its 1 pictures is in"),
        (
            json.dumps([TASK, task("sub/0.png", annotation(result("b")))]),
            "task 2: sub/0.png would be .*/0.png, as is 0.png; keep the pictures in the folders",
        ),
    ],
)
def test_another_format_or_version_is_refused_by_file_and_entry(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    file = write(tmp_path, {"out.json": content, "0.png": picture()}) / "out.json"
    with pytest.raises(ConfigError, match=f"out.json.*{message}"):
        opened(file)


def test_other_json_beside_pictures_is_no_export(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"0.png": picture(), "0.txt": "a", "coco.json": json.dumps(COCO)}
    assert captions(write(tmp_path, {**files, "0.json": json.dumps([TASK])})) == [("0.png", "a")]
