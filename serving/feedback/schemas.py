"""Record of a served image, and request and response of `POST /v1/feedback`."""

import secrets
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_COMMENT = 2000  # characters

ImageId = Annotated[str, StringConstraints(pattern=r"^img-[0-9a-f]{24}$")]
Rating = Literal[-1, 0, 1]
"""Rating of an image: -1 bad, 0 neutral (also: a withdrawn rating), +1 good. Not stars: people agree far
better on two buttons than on five, and preference training needs only better and worse."""


def new_image_id() -> str:
    """Return an unguessable id: `img-` and 96 random bits as 24 hexadecimal digits."""
    return f"img-{secrets.token_hex(12)}"


class Generation(BaseModel):
    """A served image: everything needed to reproduce it, and the requester."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_id: ImageId
    created: float = Field(description="seconds since 1970, when it was drawn")
    model: str = Field(description="name in GET /v1/models")
    version: int = Field(description="of the model registry; 0: the base alone")
    adapter: str | None = None
    adapters: list[dict[str, str | float]] | None = Field(
        None,
        description="of a picture of several or scaled adapters: the `name` and `scale` of each, in order",
    )
    prompt: str
    negative_prompt: str | None = Field(None, description="null: none was given, which is not the empty one")
    seed: int
    steps: int
    guidance_scale: float
    size: str = Field(pattern=r"^\d+x\d+$", description="width x height in pixels")
    strength: float | None = Field(None, description="of a picture that began with a given one, not kept")
    num_references: int | None = Field(None, description="reference pictures that were sent, not kept")
    guidance_interval: list[float] | None = Field(
        None, description="shares of the steps between which there was guidance; null: in all"
    )
    control_scale: float | None = Field(
        None, description="of a picture that a ControlNet steered by an image, which is not kept"
    )
    user: str | None = Field(None, description="as the request named them")
    key_id: str | None = Field(None, description="of the API key; null: none was needed")
    seconds: float = Field(description="from the request to the picture")
    role: Literal["champion", "candidate", "other"] = "champion"


EXAMPLES: dict[str, dict[str, object]] = {
    "rating": {
        "summary": "Rate an image",
        "value": {"image_id": "img-0123456789abcdef01234567", "rating": 1, "comment": "the red is right"},
    },
    "vote": {
        "summary": "Prefer one of two images",
        "value": {"image_id": "img-0123456789abcdef01234567", "over": "img-89abcdef0123456789abcdef"},
    },
}


class FeedbackRequest(BaseModel):
    """Body of POST /v1/feedback: a rating, a preference between two images, or both."""

    model_config = ConfigDict(extra="forbid")

    image_id: ImageId = Field(description="Id of the image, from its answer.")
    rating: Rating | None = Field(
        None, description="-1: bad, 0: neutral, +1: good. A later rating replaces it."
    )
    comment: str | None = Field(None, max_length=MAX_COMMENT, description="Free text.")
    over: ImageId | None = Field(None, description="Id of the image to which image_id is preferred.")

    @model_validator(mode="after")
    def _says_something(self) -> "FeedbackRequest":
        if self.rating is None and self.over is None:
            raise ValueError(
                "give a rating (-1, 0 or 1), or over: the id of the image that this one is preferred to"
            )
        if self.over == self.image_id:
            raise ValueError("over: an image cannot be preferred to itself")
        return self


class FeedbackResponse(BaseModel):
    """Answer to POST /v1/feedback, sent once the feedback is on disk."""

    object: Literal["feedback"] = "feedback"
    created: int = Field(description="Unix time in seconds.")
    image_id: str
    rating: Rating | None
    comment: str | None
    over: str | None
