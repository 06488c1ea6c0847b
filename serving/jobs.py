"""Jobs: requests that are answered at once with an id, and drawn later. Their part of the HTTP interface.

A client asks for one with the header `Prefer: respond-async` (RFC 7240, section 4.1).
"""

from typing import Literal

from pydantic import BaseModel, Field

from serving.schemas import EditRequest, ErrorBody, ImageRequest, ImageResponse, VariationRequest

Kind = Literal["generations", "edits", "variations"]
State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
OPEN: tuple[State, ...] = ("queued", "in_progress")
REQUESTS: dict[str, type[ImageRequest]] = {
    "generations": ImageRequest,
    "edits": EditRequest,
    "variations": VariationRequest,
}


class Job(BaseModel):
    """Answer to a request with `Prefer: respond-async`, and to GET /v1/jobs/{id}."""

    id: str = Field(description="Id of the job.")
    object: Literal["image.job"] = "image.job"
    status: State
    created_at: int = Field(description="Unix time in seconds.")
    finished_at: int | None = Field(None, description="Unix time in seconds; null while it is open.")
    webhook_url: str | None = Field(None, description="Where its end is announced.")
    result: ImageResponse | None = Field(None, description="Once completed: what a plain request answers.")
    error: ErrorBody | None = Field(None, description="Once failed.")


class WebhookSecret(BaseModel):
    """Answer to GET /v1/webhooks/secret."""

    secret: str = Field(description="Key of the signatures of this API key's webhooks.")
