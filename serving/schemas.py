"""Requests and responses of OpenAI's Images API, with this server's limits.

`steps`, `guidance_scale` and `seed` are extensions (the official client passes them in `extra_body`).
A field of OpenAI's that this server has no use for is refused rather than ignored, so that nobody
believes it did something; null, "auto" and values that change nothing are accepted.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_SEED = 2**31 - 1

# Values of OpenAI's other fields that ask for what this server does anyway.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "background": ("opaque",),
    "moderation": (),
    "output_compression": (100,),
    "output_format": ("png",),
    "partial_images": (0,),
    "quality": ("standard",),
    "stream": (False,),
    "style": (),
}


class APIError(Exception):
    """What the client is told: an HTTP status and OpenAI's error body."""

    # Positional, so that it can be pickled on its way from a replica.
    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON that OpenAI's clients expect."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class ImageRequest(BaseModel):
    """Body of POST /v1/images/generations."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=1000, description="what to draw")
    model: str | None = Field(None, description="name in GET /v1/models; the served one if empty")
    n: int = Field(1, ge=1, le=8, description="pictures; the i-th has seed + i")
    size: str | None = Field(None, description="width x height in pixels, for example 64x64")
    response_format: Literal["b64_json"] = Field("b64_json", description="PNG in base64")
    steps: int | None = Field(None, ge=1, le=100, description="denoising steps")
    guidance_scale: float | None = Field(
        None, ge=1, le=20, allow_inf_nan=False, description="of classifier-free guidance; 1: off"
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="of the noise; drawn if empty")
    user: str | None = Field(None, description="accepted, not used")

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, body: Any) -> Any:
        """Nulls mean absent; OpenAI's other fields may stand there if they change nothing."""
        if not isinstance(body, dict):
            return body
        kept = {}
        for field, value in body.items():
            if value is None or (value == "auto" and field in (*NEUTRAL_VALUES, "size")):
                continue
            if value in NEUTRAL_VALUES.get(field, ()):
                continue
            kept[field] = value
        return kept


class ImageData(BaseModel):
    """One picture."""

    b64_json: str = Field(description="PNG in base64")
    revised_prompt: None = Field(None, description="always null: prompts are drawn as written")
    seed: int = Field(description="draws this picture again, with n = 1")


class ImageResponse(BaseModel):
    """Answer to POST /v1/images/generations."""

    created: int = Field(description="seconds since 1970")
    data: list[ImageData]


class ModelCard(BaseModel):
    """One entry of GET /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="seconds since 1970 when the model was loaded")
    owned_by: str = "diffray"
    version: int = Field(description="of the model registry")
    size: str = Field(description="width x height of its pictures")


class ModelList(BaseModel):
    """Answer to GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def invalid_request(error: dict[str, Any]) -> APIError:
    """A 400 from the first of pydantic's errors (one item of `ValidationError.errors()`)."""
    path = [str(part) for part in error["loc"] if part != "body"]
    field = ".".join(path)
    if error["type"] == "json_invalid":
        return APIError(400, "the body is not JSON", code="invalid_json")
    if error["type"] == "extra_forbidden":
        if field in NEUTRAL_VALUES:
            message = f"{field}: not supported by this server; leave it out or send null"
        else:
            message = f"{field}: unknown field; remove it or correct its name"
        return APIError(400, message, param=field, code="unknown_parameter")
    if field == "response_format":
        message = "response_format: only b64_json is served here, not links to pictures"
        return APIError(400, message, param=field, code="invalid_value")
    where = f"{field}: " if field else ""
    return APIError(400, where + error["msg"], param=field or None, code="invalid_value")
