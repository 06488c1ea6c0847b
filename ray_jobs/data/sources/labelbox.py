"""Data rows of Labelbox (https://docs.labelbox.com/reference/export-overview): read from an NDJSON export of
version 2, and written for its import. Captions are classifications with free-form text."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from ray_jobs.config import ConfigError
from ray_jobs.data.sources.exports import Labelled, validated

CAPTION = "caption"  # name of the classification in an import


class _Text(BaseModel):
    content: str


class _Choice(BaseModel):
    name: str


class _Classification(BaseModel):
    name: str
    text_answer: _Text | None = None
    radio_answer: _Choice | None = None
    checklist_answers: list[_Choice] | None = None


class _Annotations(BaseModel):
    objects: list[dict[str, Any]] = []
    classifications: list[_Classification] = []


class _Details(BaseModel):
    created_at: str = ""
    updated_at: str = ""


class _Performance(BaseModel):
    skipped: bool = False


class _Label(BaseModel):
    annotations: _Annotations
    label_details: _Details = _Details()
    performance_details: _Performance = _Performance()


class _Project(BaseModel):
    labels: list[_Label] = []


class _DataRow(BaseModel):
    row_data: str = ""
    global_key: str | None = None
    external_id: str | None = None


class _Entry(BaseModel):
    data_row: _DataRow
    projects: dict[str, _Project]


def is_data_row(entry: dict[str, Any]) -> bool:
    return "data_row" in entry or "Labeled Data" in entry or "DataRow ID" in entry


def read_data_rows(where: str, entries: Sequence[dict[str, Any]]) -> list[Labelled]:
    """Read the data rows of an export; of several labels the latest counts.

    Raises:
        ConfigError: an entry is not a data row of the current format.
    """
    found = []
    for number, entry in enumerate(entries, 1):
        place = f"{where}: data row {number}"
        if "data_row" not in entry:
            raise ConfigError(
                f"{place}: is of Labelbox's export v1; export the project again, as NDJSON (v2)"
            )
        row = validated(
            _Entry, entry, place, "export the data rows from a project, with its labels, as NDJSON"
        )
        labels = [label for project in row.projects.values() for label in project.labels]
        given = [label for label in labels if not label.performance_details.skipped]
        latest = max(
            given,
            key=lambda label: label.label_details.updated_at or label.label_details.created_at,
            default=None,
        )
        captions, values = dict[str, list[str]](), dict[str, str]()
        for each in latest.annotations.classifications if latest else []:
            if each.text_answer:
                captions[each.name] = [each.text_answer.content]
            elif each.radio_answer:
                values[each.name] = each.radio_answer.name
            elif each.checklist_answers:
                values[each.name] = ", ".join(answer.name for answer in each.checklist_answers)
        data = row.data_row
        references = tuple(name for name in (data.global_key, data.external_id, data.row_data) if name)
        if not references:
            raise ConfigError(f"{place}: data_row names no picture: no global_key, external_id or row_data")
        kinds = {"objects"} if any(label.annotations.objects for label in labels) else set[str]()
        kinds |= {"classifications" for label in labels if label.annotations.classifications}
        found.append(Labelled(place, references, captions, values, tuple(sorted(kinds))))
    return found


def data_row(row_data: str, global_key: str) -> dict[str, Any]:
    """Return a data row to create; `row_data` is a URL, or a local path that Labelbox's SDK uploads."""
    return {"row_data": row_data, "global_key": global_key, "media_type": "IMAGE"}


def label(global_key: str, caption: str) -> dict[str, Any]:
    """Return the line of a label import with the caption of a data row."""
    return {"name": CAPTION, "answer": caption, "dataRow": {"globalKey": global_key}}
