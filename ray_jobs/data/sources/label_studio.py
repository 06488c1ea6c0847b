"""Tasks of Label Studio (https://labelstud.io/guide/task_format): read from its JSON export, and written.

Captions are results of a TextArea; an export of Label Studio 1.x holds one object per picture.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel

from ray_jobs.config import ConfigError
from ray_jobs.data.sources.exports import Labelled, picture_path, validated
from ray_jobs.data.sources.listing import PICTURE_SUFFIXES

CAPTION, IMAGE = "caption", "image"  # names of the control and the object in LABELING
LABELING = (
    f'<View><Image name="{IMAGE}" value="${IMAGE}"/>'
    f'<TextArea name="{CAPTION}" toName="{IMAGE}" editable="true"/></View>'
)
"""Labeling interface of a project for tasks that `task` returns."""
LOCAL_FILES = "/data/local-files/?d="  # Label Studio's address of a file below its document root


class _Result(BaseModel):
    """A result of an annotation, of which only those of the whole picture count."""

    type: str = ""
    from_name: str = ""
    value: dict[str, Any] = {}

    @property
    def is_of_region(self) -> bool:
        return "x" in self.value or "points" in self.value

    def texts(self, kind: str) -> list[str]:
        """Return the texts of a result of a kind: `text` of a TextArea, `choices` of Choices."""
        given = self.value.get(kind)
        return [str(each) for each in (given if isinstance(given, list) else [given]) if each]


class _Annotation(BaseModel):
    result: list[_Result] = []
    was_cancelled: bool = False
    ground_truth: bool = False
    updated_at: str = ""


class _Task(BaseModel):
    data: dict[str, Any]
    annotations: list[_Annotation] = []
    # Some exports list only the numbers of predictions.
    predictions: list[_Annotation | int] = []

    @property
    def results(self) -> list[_Result]:
        """Results that count: of the ground truth or the latest annotation, else of the latest prediction."""
        if self.annotations:
            given = [each for each in self.annotations if not each.was_cancelled]
            latest = max(given, key=lambda each: (each.ground_truth, each.updated_at), default=None)
        else:
            latest = next(
                (each for each in reversed(self.predictions) if isinstance(each, _Annotation)), None
            )
        return [each for each in latest.result if not each.is_of_region] if latest else []


def is_task(entry: dict[str, Any]) -> bool:
    return "data" in entry or "completions" in entry


def read_tasks(where: str, entries: Sequence[dict[str, Any]], image_column: str | None) -> list[Labelled]:
    """Read the tasks of an export.

    Raises:
        ConfigError: an entry is not a task of the current format, or does not name a picture.
    """
    found = []
    for number, entry in enumerate(entries, 1):
        place = f"{where}: task {number}"
        if "completions" in entry:
            raise ConfigError(
                f"{place}: has completions, as Label Studio before 1.0 wrote them; export it from a current "
                "version, as JSON"
            )
        task = validated(_Task, entry, place, "export the project as JSON (not JSON-MIN)")
        column = image_column or _image_key(place, task.data)
        image = task.data.get(column)
        if not isinstance(image, str) or not image:
            raise ConfigError(
                f"{place}: data.{column} must be the picture's path or URL, not {image!r} (found: "
                f"{', '.join(task.data) or 'nothing'}); name the field in the source's image_column"
            )
        values = {
            name: str(value) for name, value in task.data.items() if isinstance(value, str | int | float)
        }
        captions: dict[str, list[str]] = {}
        for result in task.results:
            if result.type == "textarea":
                captions.setdefault(result.from_name, []).extend(result.texts("text"))
            elif result.type == "choices":
                values[result.from_name] = ", ".join(result.texts("choices"))
        kinds = {result.type for each in task.annotations for result in each.result}
        found.append(Labelled(place, (image,), captions, values, tuple(sorted(kinds))))
    return found


def _image_key(place: str, data: dict[str, Any]) -> str:
    """Key of the picture in a task's data: `image`, or the only value that ends as a picture's name does."""
    texts = {name: value for name, value in data.items() if isinstance(value, str)}
    pictures = [
        name for name, value in texts.items() if picture_path(value).lower().endswith(PICTURE_SUFFIXES)
    ]
    if IMAGE in data or len(pictures) != 1:
        return IMAGE
    return pictures[0]


def task(image: str, captions: Sequence[str], values: dict[str, str], model: str | None) -> dict[str, Any]:
    """Return a task to import, with its captions as a prediction.

    Args:
        image: address of the picture, as Label Studio opens it.
        values: further fields of its data.
        model: model that wrote the captions, if one did.
    """
    result = {
        "from_name": CAPTION,
        "to_name": IMAGE,
        "type": "textarea",
        "value": {"text": list(captions)},
    }
    predictions = [{"model_version": model or "source", "result": [result]}] if captions else []
    return {"data": values | {IMAGE: image}, "predictions": predictions}


def local_file(path: str) -> str:
    """Return Label Studio's address of a file at a path below its document root."""
    return LOCAL_FILES + quote(path)
