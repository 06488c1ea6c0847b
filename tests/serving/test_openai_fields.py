"""OpenAI's fields and OpenAI's retries, by its own client and its own types."""

import inspect
import typing
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from openai.resources.images import Images
from openai.types import image_create_variation_params, image_edit_params, image_generate_params
from pydantic import ValidationError

from ray_jobs.config import ServeConfig
from serving.http.api import _answer_error, _edit_of, _json
from serving.schemas import (
    UNSUPPORTED_FIELDS,
    APIError,
    EditRequest,
    ImageRequest,
    VariationRequest,
    invalid_request,
    limited,
)
from tests.serving.http_server import http_server

GENERATE = typing.get_type_hints(image_generate_params.ImageGenerateParamsBase)
EDIT = typing.get_type_hints(image_edit_params.ImageEditParamsBase)
VARY = typing.get_type_hints(image_create_variation_params.ImageCreateVariationParams)
OPERATIONS: list[tuple[type[ImageRequest], dict[str, Any], Any]] = [
    (ImageRequest, GENERATE, Images.generate),
    (EditRequest, EDIT, Images.edit),
    (VariationRequest, VARY, Images.create_variation),
]
OF_THE_CLIENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}  # what no server is sent
TAKEN = {"image", "safety_identifier"}  # by other means than a field of the same name


def refused(model: type[ImageRequest], **fields: Any) -> APIError:
    with pytest.raises(ValidationError) as caught:
        model.model_validate({"prompt": "a", **fields})
    return invalid_request(caught.value.errors()[0])


@pytest.mark.parametrize(("model", "theirs", "method"), OPERATIONS)
def test_every_field_of_openais_client_is_known(
    model: type[ImageRequest], theirs: dict[str, Any], method: Any
) -> None:
    named = set(theirs) | set(inspect.signature(method).parameters) - OF_THE_CLIENT
    unknown = named - set(model.model_fields) - set(UNSUPPORTED_FIELDS) - TAKEN
    assert not unknown, "of a newer client: take them, or say in UNSUPPORTED_FIELDS why not"
    for field in set(theirs) & set(UNSUPPORTED_FIELDS):
        error = refused(model, **{field: "what no server would take for neutral"})
        assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")
        assert UNSUPPORTED_FIELDS[field].reason in error.message and "unknown" not in error.message
    assert set(UNSUPPORTED_FIELDS) <= set(GENERATE) | set(EDIT) | set(VARY), "these are no longer OpenAI's"


@pytest.mark.parametrize(("model", "theirs", "method"), OPERATIONS)
def test_every_value_of_openais_client_is_taken_or_refused_by_name(
    model: type[ImageRequest], theirs: dict[str, Any], method: Any
) -> None:
    checked = 0
    for field, hint in theirs.items():
        for value in _choices(hint):
            checked += 1
            other = {"output_format": "jpeg"} if field == "output_compression" else {}
            try:
                taken = model.model_validate({"prompt": "a", field: value, **other})
            except ValidationError as error:
                told = invalid_request(error.errors()[0])
                assert told.param == field and told.status == 400
            else:
                obeyed = getattr(taken, field, None)
                assert value == "auto" or obeyed == value or value in UNSUPPORTED_FIELDS[field].neutral
    assert checked > 4


def _choices(hint: Any) -> Iterator[Any]:
    """The values that a type names."""
    if typing.get_origin(hint) is typing.Literal:
        yield from typing.get_args(hint)
    for part in typing.get_args(hint):
        yield from _choices(part)


@pytest.mark.parametrize(
    ("fields", "param", "what"),
    [
        ({"output_compression": 80}, "output_compression", "send output_format jpeg or webp"),
        ({"output_compression": 101, "output_format": "webp"}, "output_compression", "equal to 100"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"quality": "high", "steps": 3}, "quality", "send either quality or steps"),
        ({"response_format": "url", "stream": True}, "response_format", "leave out url, or stream"),
        ({"background": "transparent"}, "background", "send opaque or auto"),
        ({"guidance_interval": [0.8, 0.2]}, "guidance_interval", "two shares of the steps"),
        ({"guidance_interval": "[0, NaN]"}, "guidance_interval", "two shares of the steps"),
        ({"guidance_interval": [0.5]}, "guidance_interval", "at least 2 items"),
        ({"style": "vivid"}, "style", "write the style into the prompt"),
    ],
)
def test_what_is_refused_says_what_to_send_instead(fields: dict[str, Any], param: str, what: str) -> None:
    error = refused(ImageRequest, **fields)
    assert (error.status, error.param) == (400, param)
    assert what in error.message


def test_a_field_of_nobodys_is_unknown() -> None:
    error = refused(ImageRequest, num_inference_steps=3)
    assert (error.param, error.code) == ("num_inference_steps", "unknown_parameter")
    assert refused(EditRequest, **{"svg[model]": "x"}).code == "unsupported_parameter"


@pytest.mark.parametrize("field", sorted(UNSUPPORTED_FIELDS))
def test_null_auto_and_neutral_values_are_accepted(field: str) -> None:
    for value in (None, "auto", *UNSUPPORTED_FIELDS[field].neutral):
        assert ImageRequest.model_validate({"prompt": "a", field: value}).prompt == "a"


def test_a_safety_identifier_is_the_user_unless_it_is_empty() -> None:
    for fields, user in (
        ({"safety_identifier": "new", "user": "old"}, "new"),
        ({"safety_identifier": "", "user": "old"}, "old"),
        ({"safety_identifier": None, "user": "old"}, "old"),
        ({"safety_identifier": "new"}, "new"),
        ({"safety_identifier": ""}, None),
    ):
        assert ImageRequest.model_validate({"prompt": "a", **fields}).user == user
    assert refused(ImageRequest, safety_identifier="x" * 257).param == "user"


class Server:
    """Answers every request with `error`, the edits' forms after they were read; counts them."""

    def __init__(self) -> None:
        self.error = APIError(500, "unset")
        self.asked = 0
        self.api = FastAPI()
        self.api.add_exception_handler(APIError, _answer_error)
        edits = limited(EditRequest, ServeConfig())

        @self.api.post("/v1/images/generations")
        async def generate() -> None:
            self.asked += 1
            raise self.error

        @self.api.post("/v1/images/edits")
        async def edit(request: Request) -> Any:
            body, (images, mask) = await _edit_of(request, edits)
            files = {"images": [*map(bytes.decode, images)], "mask": mask and mask.decode()}
            return _json({"created": 1, "data": [], "user": body.user, **files})


@pytest.fixture(scope="module")
def server() -> Server:
    return Server()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with (
        http_server(server.api) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (APIError(504, "not drawn in time", code="timeout"), 1),
        (APIError(500, "drawing failed", code="drawing_failed"), 1),
        (APIError(500, "not checked", code="safety_check_failed"), 1),
        (APIError(503, "of another base", "model", "model_refused"), 1),
        (APIError(400, "n: too many", "n", "invalid_value"), 1),
        (APIError(404, "no such model", "model", "model_not_found"), 1),
        (APIError(429, "later", None, "rate_limit_exceeded", {"retry-after": "0.01"}), 3),
        (APIError(503, "full", None, "queue_full", {"retry-after": "0.01"}), 3),
    ],
    ids=lambda value: value.code if isinstance(value, APIError) else str(value),
)
def test_openais_client_asks_again_only_where_that_helps(
    server: Server, client: openai.OpenAI, error: APIError, times: int
) -> None:
    server.error, server.asked = error, 0
    with pytest.raises(openai.APIStatusError) as raised:
        client.images.generate(prompt="a red apple")
    assert raised.value.status_code == error.status and raised.value.code == error.code
    assert server.asked == times


def test_fields_of_an_edit_are_named_by_openais_client(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"prompt": "a", "image": b"a picture"}
    answer: Any = client.images.edit(
        **fields,
        background="auto",
        input_fidelity="low",
        output_format="png",
        output_compression=100,
        quality="auto",
        size="auto",
        safety_identifier="someone",
    )
    assert (answer.user, answer.images) == ("someone", ["a picture"])
    several: Any = client.images.edit(prompt="a", image=[b"one", b"two"], mask=b"a mask")
    assert (several.images, several.mask, answer.mask) == (["one", "two"], "a mask", None)
    with pytest.raises(openai.BadRequestError, match="image: missing") as without:
        client.images.edit(prompt="a", image=b"")
    assert without.value.param == "image"
    twice = httpx.post(f"{client.base_url}images/edits", files=[("image", b"a"), ("n", b"1"), ("n", b"1")])
    assert (twice.status_code, twice.json()["error"]["param"]) == (400, "n")
    assert "given more than once" in twice.json()["error"]["message"]
    others: tuple[dict[str, Any], ...] = (
        {"markup": b"\xff"},
        {"input_fidelity": "high"},
    )
    for other in others:
        with pytest.raises(openai.BadRequestError, match="not supported by this server") as told:
            client.images.edit(**fields, **other)
        assert (told.value.param, told.value.code) == (next(iter(other)), "unsupported_parameter")
