"""Several LoRA versions in one request, from HTTP to the picture and its record."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from serving.feedback.replay import Replayer
from serving.messages import adapter_name
from serving.provenance import read_provenance
from serving.request import Request, ScaledAdapter
from tests.serving import plain_diffusers
from tests.serving.endpoint_here import EndpointHere, endpoint_here
from tests.serving.test_adapter_mixtures import plain_with
from tests.serving.test_adapters import TOLERANCE

PROMPT = "a small red circle"


@pytest.fixture(scope="module")
def here(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EndpointHere]:
    with endpoint_here(tmp_path_factory.mktemp("here"), tiny_model, max_adapters=2) as endpoint:
        yield endpoint


def chosen(*scales: float) -> list[dict[str, Any]]:
    return [{"name": f"served@{number}", "scale": scale} for number, scale in enumerate(scales, start=1)]


def pixels_of(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).astype(np.float32)


def test_a_picture_of_two_versions_is_that_of_diffusers_and_is_drawn_again_from_its_record(
    here: EndpointHere, tiny_model: Path
) -> None:
    body: dict[str, Any] = {"seed": 3, "steps": 3, "guidance_scale": 2.0, "adapters": chosen(0.5, -0.8)}
    answer: Any = here.client.images.generate(prompt=PROMPT, extra_body=body)
    assert (answer.model, answer.adapters) == ("base", chosen(0.5, -0.8))

    names = [adapter_name(version) for version in here.versions]
    mixture = (ScaledAdapter(names[0], 0.5), ScaledAdapter(names[1], -0.8))
    folders = {adapter_name(version): Path(version.source) for version in here.versions}
    request = Request(PROMPT, 3, 3, 2.0, adapters=mixture)
    expected = plain_diffusers.draw(plain_with(tiny_model, mixture, folders), request).numpy()
    picture = answer.data[0]
    assert np.abs(pixels_of(picture.b64_json) - expected).max() <= TOLERANCE

    facts = read_provenance(base64.b64decode(picture.b64_json))
    assert facts and facts["adapters"] == [{"name": n, "scale": s} for n, s in mixture]
    here.store.flush()
    (recorded,) = here.store.generations([picture.id])
    assert recorded.adapters == facts["adapters"] and (recorded.model, recorded.version) == ("base", 0)
    again = Replayer(here.url).draw(recorded)
    assert np.array_equal(pixels_of(base64.b64encode(again).decode()), pixels_of(picture.b64_json))


def test_guidance_on_an_interval_is_recorded_and_drawn_again(here: EndpointHere) -> None:
    body: dict[str, Any] = {"seed": 3, "steps": 4, "guidance_scale": 4.0, "model": "base"}
    answers: list[Any] = [
        here.client.images.generate(prompt=PROMPT, extra_body=body | fields)
        for fields in ({}, {"guidance_interval": [0.25, 0.75]})
    ]
    whole, part = (pixels_of(each.data[0].b64_json) for each in answers)
    assert np.abs(whole - part).max() > 2
    here.store.flush()
    (recorded,) = here.store.generations([answers[1].data[0].id])
    assert recorded.guidance_interval == [0.25, 0.75]
    again = base64.b64encode(Replayer(here.url).draw(recorded)).decode()
    assert np.abs(pixels_of(again) - part).max() <= 1


def test_an_edit_and_a_stream_take_them_too(here: EndpointHere) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(file, "PNG")
    edited: Any = here.client.images.edit(
        image=file.getvalue(), prompt=PROMPT, extra_body={"adapters": json.dumps(chosen(1, 0))}
    )
    assert edited.adapters == chosen(1, 0)
    *_, last = here.client.images.generate(
        prompt=PROMPT, stream=True, extra_body={"adapters": [{"name": "served:candidate"}]}
    )
    assert last.adapters == [{"name": "served@2", "scale": 1.0}]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"adapters": [{"name": "other"}]}, "adapters.0.name", "the model 'other' does not exist"),
        ({"adapters": [*chosen(1), {"name": "base"}]}, "adapters.1.name", "'base' is no LoRA version"),
        (
            {"adapters": [*chosen(1), {"name": "served:champion"}]},
            "adapters.1.name",
            "served@1 is listed twice",
        ),
        ({"adapters": [*chosen(1, 1), {"name": "served"}]}, "adapters", "at most 2 items"),
        ({"adapters": chosen(11)}, "adapters.0.scale", "less than or equal to 10"),
        ({"adapters": [{"name": "served@1", "weight": 1}]}, "adapters.0.weight", "unknown field"),
        ({"adapters": "served@1"}, "adapters", "must be a list such as"),
        ({"adapters": []}, "adapters", "at least 1 item"),
        ({"adapters": chosen(1), "model": "served@2"}, "model", "leave it out beside adapters"),
    ],
)
def test_what_cannot_be_combined_names_its_field(
    here: EndpointHere, fields: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as refused:
        here.client.images.generate(prompt=PROMPT, extra_body=fields)
    assert refused.value.param == param


def test_a_form_that_spells_a_list_otherwise_is_told_how(here: EndpointHere) -> None:
    fields = {"prompt": PROMPT, "adapters[][name]": "served@1"}
    answer = httpx.post(f"{here.url}/v1/images/edits", data=fields, files={"image": b"x"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "adapters[][name]")
    assert "send adapters as JSON" in error["message"]
