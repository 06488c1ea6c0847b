"""Requests and responses of OpenAI's Images API, with this server's limits.

`negative_prompt`, `steps`, `guidance_scale`, `guidance_interval`, `seed`, `adapters`, `strength`,
`control_image`, `control_scale` and `webhook_url` are extensions (the official client passes them in
`extra_body`).
A field of OpenAI's that this server has no use for is refused with the reason rather than ignored, so that
nobody believes it did something; null, "auto" and values that change nothing are accepted.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from pydantic_core import ErrorDetails

from ray_jobs.config import ServeConfig
from serving.encoding import Format

MAX_SEED = 2**31 - 1
STRENGTH = 0.8  # default of edits


class Unsupported(NamedTuple):
    """A field of OpenAI's API that this server does not support.

    Attributes:
        reason: explanation, and the alternative if there is one.
        neutral: values that request what this server does anyway.
    """

    reason: str
    neutral: tuple[str | int, ...] = ()


STILL = "every image is a single PNG, JPEG or WebP; leave it out"
STEPS_BY_QUALITY = {"low": 0.5, "medium": 1.0, "standard": 1.0, "high": 1.5, "hd": 1.5, "xhigh": 2.0}
"""Factors of a server's default steps; `max` asks for the most steps that the server allows."""
ShownQuality = Literal["low", "medium", "high", "xhigh", "max"]
Quality = Literal[ShownQuality, "standard", "hd"]
UNSUPPORTED_FIELDS = {
    "background": Unsupported("the model generates no transparency; send opaque or auto", ("opaque",)),
    "complexity": Unsupported("the model has no planning phase; send quality or steps instead"),
    "frame_count": Unsupported(STILL),
    "frame_duration_ms": Unsupported(STILL),
    "input_fidelity": Unsupported("send a smaller strength, which keeps more of the image", ("low",)),
    "markup": Unsupported("send a mask of what is to change instead, and what it is to be in the prompt"),
    "mask": Unsupported("send it as a file to /v1/images/edits, with its image"),
    "moderation": Unsupported("the server's own safety checker sees every image; send auto"),
    "style": Unsupported("write the style into the prompt, or choose a model or adapters that have it"),
    "svg": Unsupported(STILL),
}

# OpenAI's clients (3.52) retry a request, twice by default, on 408, 409, 429 and all statuses from 500 on,
# unless the answer says otherwise. A request that timed out would run three times, a failed one fail again.
DO_NOT_RETRY = {"x-should-retry": "false"}

DRAWING_FAILED = "drawing_failed"
"""Code of an error whose message is that of an exception in a replica, which no client is told."""


class APIError(Exception):
    """An error for the client: an HTTP status, OpenAI's error body, and headers such as Retry-After."""

    # Positional arguments, so that it can be pickled on its way from a replica.
    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, param, code, headers)
        self.status, self.message, self.param, self.code = status, message, param, code
        vain = status in (500, 504) or code == "model_refused"
        self.headers = {**(DO_NOT_RETRY if vain else {}), **(headers or {})}

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the JSON that OpenAI's clients expect."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def for_client(self, request_id: str | None) -> "APIError":
        """Return the error without what a replica's exception says of the server, which is for the log."""
        if self.code != DRAWING_FAILED:
            return self
        message = f"image generation failed; the server's log has details under the request id {request_id}"
        return APIError(self.status, message, code=self.code)


class AdapterChoice(BaseModel):
    """One of several adapters that draw an image together."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=300, description="LoRA version, as `model` names one.")
    scale: float = Field(
        1.0, ge=-10, le=10, allow_inf_nan=False, description="Factor of its change; 0 turns it off."
    )


class ImageRequest(BaseModel):
    """Body of POST /v1/images/generations. `limited` adds the limits of a server's configuration."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"prompt": "a red apple", "seed": 1},
                {"prompt": "a rocket", "n": 2, "steps": 20, "guidance_scale": 2.0, "user": "someone"},
                {"prompt": "a cat", "stream": True, "partial_images": 3},
            ]
        },
    )

    prompt: str = Field(min_length=1, description="Text that describes the image.")
    model: str | None = Field(
        None, max_length=300, description="Model id from GET /v1/models. Default: the served model."
    )
    adapters: list[AdapterChoice] | None = Field(
        None,
        min_length=1,
        description="LoRA versions to apply to the base one after the other, in this order, instead of "
        "`model`'s. In a form: the list as JSON.",
    )
    n: int = Field(1, ge=1, description="Number of images; image i (from 0) uses seed + i.")
    size: str | None = Field(
        None,
        pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$",
        description="Width x height in pixels, for example 64x64. Default: the model's own size.",
    )
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="The file in base64, or an address at which it can be fetched for a while."
    )
    output_format: Format = Field("png", description="Kind of the file.")
    output_compression: int = Field(
        100,
        ge=0,
        le=100,
        description="Quality of a JPEG or WebP file, in percent; PNG, and WebP at 100, are lossless.",
    )
    quality: Quality | None = Field(
        None,
        description="Number of steps relative to the default, instead of `steps`: half of it for low, 1.5 "
        "times for high, twice for xhigh, and for max the most that are allowed.",
    )
    stream: bool = Field(False, description="Send server-sent events; requires n = 1.")
    partial_images: int = Field(0, ge=0, le=3, description="Number of previews; requires stream.")
    negative_prompt: str | None = Field(None, description="Text that describes what to avoid.")
    steps: int | None = Field(None, ge=1, description="Number of denoising steps.")
    guidance_scale: float | None = Field(
        None,
        ge=1,
        le=100,
        allow_inf_nan=False,
        description="Guidance scale; 1 turns it off.",
    )
    guidance_interval: list[float] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Guidance only from one share of the steps to another, such as [0.2, 0.8], which is "
        "faster. In a form: the list as JSON.",
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Seed of the initial noise. Default: random."
    )
    control_image: str | None = Field(
        None,
        min_length=1,
        description="Image that the model follows (`control` of GET /v1/models), for example edges: PNG, "
        "JPEG or WebP, base64-encoded, also as a data: URL. In a form: a file. Without `size` the image has "
        "its size.",
    )
    control_scale: float | None = Field(
        None,
        ge=0,
        le=2,
        allow_inf_nan=False,
        description="How much a ControlNet counts; 0 turns it off. Default: 1, which adapters take only.",
    )
    user: str | None = Field(
        None,
        max_length=256,
        description="Stable id of your end user, such as a hash; a user stays with one version. "
        "safety_identifier is accepted too.",
    )

    webhook_url: str | None = Field(
        None,
        max_length=2000,
        pattern=r"^https?://\S+$",
        description="Address at which the end of a job is announced; requires Prefer: respond-async.",
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, body: object) -> object:
        """Drop nulls, and OpenAI's other fields if they change nothing; parse what a form holds as JSON.
        `safety_identifier`, OpenAI's newer name for `user`, takes precedence over `user` unless it is
        empty."""
        if not isinstance(body, dict):
            return body
        kept: dict[object, object] = {}
        for field, value in body.items():
            if value is None or (value == "auto" and field in (*UNSUPPORTED_FIELDS, "size", "quality")):
                continue
            if field in UNSUPPORTED_FIELDS and value in UNSUPPORTED_FIELDS[field].neutral:
                continue
            kept[field] = value
        if identifier := kept.pop("safety_identifier", None):
            kept["user"] = identifier
        for field in ("adapters", "guidance_interval"):
            if isinstance(text := kept.get(field), str):
                with suppress(json.JSONDecodeError):  # the field's own check names it
                    kept[field] = json.loads(text)
        return kept

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.output_format == "png" and self.output_compression != 100:
            raise ValueError("output_compression: a PNG is lossless; send output_format jpeg or webp")
        if self.guidance_interval is not None:
            start, end = self.guidance_interval
            if not 0 <= start < end <= 1:
                raise ValueError("guidance_interval: must be two shares of the steps, such as [0.2, 0.8]")
        if self.quality and self.steps:
            raise ValueError("quality: chooses the number of steps; send either quality or steps")
        if self.response_format == "url" and self.stream:
            raise ValueError("response_format: a stream sends b64_json; leave out url, or stream")
        return self


class EditRequest(ImageRequest):
    """Fields of the form of POST /v1/images/edits, beside the images."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": []})

    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="How far the one image, with which drawing begins, may change, up to 1: completely. "
        f"Default: {STRENGTH}, with a mask 1; for models that take references, none: the images are "
        "references.",
    )


class VariationRequest(EditRequest):
    """Fields of the form of POST /v1/images/variations, beside the image."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": []})

    prompt: str = Field("", description="Text that describes the variations.")
    strength: float = Field(
        STRENGTH,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="How far the image may change, up to 1: completely.",
    )


Limited = TypeVar("Limited", bound=ImageRequest)


def limited(request: type[Limited], settings: ServeConfig) -> type[Limited]:
    """Return a request model with the configuration's limits, for validation and the OpenAPI document."""
    length = Field(max_length=settings.max_prompt_length)
    limits: dict[str, Any] = {
        "prompt": length,
        "negative_prompt": length,
        "n": Field(le=settings.max_pictures),
        "adapters": Field(max_length=settings.max_adapters),
        "steps": Field(le=settings.max_steps),
    }
    fields: dict[str, Any] = {name: _narrowed(request, name, limit) for name, limit in limits.items()}
    return create_model(request.__name__, __base__=request, __doc__=request.__doc__, **fields)


def _narrowed(request: type[ImageRequest], name: str, limit: Any) -> Any:
    """Return type and definition of a request's field with a limit beside its own."""
    field = request.model_fields[name]
    kind: Any = field.annotation
    default = ... if field.is_required() else field.default
    return Annotated[kind, *field.metadata, limit], Field(default, description=field.description)


def width_and_height(size: str) -> tuple[int, int]:
    """Parse a `size` that ImageRequest has validated, in pixels."""
    width, height = size.split("x")
    return int(width), int(height)


def shown_quality(request: ImageRequest) -> ShownQuality | None:
    """Return a request's quality as answers name it, by OpenAI's newer names."""
    if request.quality == "standard":
        return "medium"
    return "high" if request.quality == "hd" else request.quality


class ImageData(BaseModel):
    """One generated image."""

    id: str = Field(pattern="^img-[0-9a-f]{24}$", description="Id of the image, for POST /v1/feedback.")
    b64_json: str | None = Field(None, description="The file in base64, unless response_format is url.")
    url: str | None = Field(None, description="Address of the file, if response_format is url.")
    revised_prompt: None = Field(None, description="Always null: prompts are used unchanged.")
    seed: int = Field(description="Seed that reproduces this image with n = 1.")


class ImageResponse(BaseModel):
    """Answer to POST /v1/images/generations."""

    created: int = Field(description="Unix time in seconds.")
    data: list[ImageData]
    model: str = Field(description="name@version that generated the images; request it to reproduce them.")
    adapters: list[AdapterChoice] | None = Field(
        None, description="With `model` base: the versions that were combined, each as name@version."
    )
    size: str = Field(description="Width x height in pixels.")
    background: Literal["opaque"] = "opaque"
    output_format: Format = "png"
    quality: ShownQuality | None = Field(
        None, description="As requested; standard is medium, and hd is high."
    )
    safety_identifier: str | None = Field(None, description="The request's, or its `user`.")


class Usage(BaseModel):
    """OpenAI's field; this server counts no tokens."""

    input_tokens: int = 0
    input_tokens_details: dict[str, int] = {"image_tokens": 0, "text_tokens": 0}
    output_tokens: int = 0
    total_tokens: int = 0


class PictureEvent(BaseModel):
    """Fields of both kinds of image events."""

    b64_json: str = Field(description="The file in base64.")
    created_at: int = Field(description="Unix time in seconds.")
    size: str = Field(description="Width x height in pixels.")
    quality: Literal[ShownQuality, "auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: Format = "png"


class PartialImageEvent(PictureEvent):
    """A preview in a stream."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"] = (
        "image_generation.partial_image"
    )
    partial_image_index: int = Field(description="Index of the preview, from 0.")


class CompletedEvent(PictureEvent):
    """The finished image, the last event of a stream."""

    type: Literal["image_generation.completed", "image_edit.completed"] = "image_generation.completed"
    id: str = Field(description="Id of the image, for POST /v1/feedback.")
    seed: int = Field(description="Seed that reproduces this image.")
    model: str = Field(description="name@version that generated the image.")
    adapters: list[AdapterChoice] | None = Field(None, description="As in an answer without a stream.")
    usage: Usage = Usage()


ImageEvent = PartialImageEvent | CompletedEvent


class ErrorBody(BaseModel):
    """An error in the format of OpenAI's API."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every error."""

    error: ErrorBody


class Readiness(BaseModel):
    """Answer to GET /readyz."""

    status: Literal["ok"] = "ok"
    model: str = Field(description="name@version that answers requests by default.")
    notice: str | None = Field(
        description="Problem for an operator, such as a champion that cannot be served."
    )


class ModelCard(BaseModel):
    """One entry of GET /v1/models."""

    id: str = Field(description="Value for the field model of a request.")
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time in seconds at which the endpoint started.")
    owned_by: str = "diffray"
    version: int | None = Field(description="Version in the model registry; null for the bare base.")
    size: str = Field(description="Default width x height in pixels.")
    references: int = Field(
        description="Maximum number of an edit's reference images; 0: an edit begins with its one image."
    )
    masks: bool = Field(
        description="True: the model was trained to paint into masks, and an edit needs one; others may have "
        "one, outside of which the image stays."
    )
    control: bool = Field(description="True: it follows `control_image`, by a ControlNet or by itself.")


class ModelList(BaseModel):
    """Answer to GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def unsupported(field: str) -> APIError:
    """Make the 400 for a field of `UNSUPPORTED_FIELDS`; a form writes objects as svg[model]."""
    reason = UNSUPPORTED_FIELDS[field.partition("[")[0]].reason
    message = f"{field}: not supported by this server: {reason}"
    return APIError(400, message, param=field, code="unsupported_parameter")


def invalid_request(error: ErrorDetails) -> APIError:
    """Make a 400 from one of pydantic's errors (an item of `ValidationError.errors()`)."""
    path = [str(part) for part in error["loc"] if part != "body"]
    field = ".".join(path)
    if error["type"] == "json_invalid":
        return APIError(400, "the body is not JSON", code="invalid_json")
    if error["type"] == "extra_forbidden":
        if field.partition("[")[0] in UNSUPPORTED_FIELDS:
            return unsupported(field)
        known = "in a form, send adapters as JSON" if field.startswith("adapters[") else None
        message = f"{field}: unknown field; {known or 'remove it or correct its name'}"
        return APIError(400, message, param=field, code="unknown_parameter")
    if error["type"] == "string_pattern_mismatch" and field == "size":
        message = "size: must be width x height in pixels, for example 64x64"
        return APIError(400, message, param=field, code="invalid_value")
    if error["type"] == "value_error" and not field:  # of several fields, the first of which is named
        message = error["msg"].removeprefix("Value error, ")
        name = message.partition(":")[0]
        return APIError(400, message, param=name if name.isidentifier() else None, code="invalid_value")
    if field.startswith("adapters") and error["type"] in ("list_type", "model_type"):
        message = (
            f'{field}: must be a list such as [{{"name": "styles@3", "scale": 0.7}}]; in a form, as JSON'
        )
        return APIError(400, message, param=field, code="invalid_value")
    where = f"{field}: " if field else ""
    return APIError(400, where + error["msg"], param=field or None, code="invalid_value")
