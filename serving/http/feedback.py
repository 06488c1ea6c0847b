"""Route `POST /v1/feedback`: ratings of images, and preferences between two."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Body, Depends

from serving.feedback.schemas import EXAMPLES, FeedbackRequest, FeedbackResponse
from serving.feedback.store import FeedbackStore
from serving.schemas import ErrorResponse


def feedback_router(store: Callable[..., FeedbackStore], key_id: Callable[..., str | None]) -> APIRouter:
    """Make the router of `POST /v1/feedback`.

    Both arguments are FastAPI dependencies, so that a router can be created, and sent to a replica, before
    there is a store.

    Args:
        store: returns the store of this process.
        key_id: returns the id of the API key, already checked for the scope `feedback`; None: no key needed.
    """
    router = APIRouter(tags=["feedback"])

    @router.post(
        "/v1/feedback",
        summary="Rate an image, or prefer one to another",
        responses={
            400: {"model": ErrorResponse, "description": "A field is invalid; `param` names it."},
            404: {"model": ErrorResponse, "description": "The image does not exist."},
            503: {"model": ErrorResponse, "description": "The feedback database is unavailable."},
        },
    )
    def give_feedback(  # not async: the commit blocks a pool thread, not the event loop
        body: Annotated[FeedbackRequest, Body(openapi_examples=EXAMPLES)],
        kept: Annotated[FeedbackStore, Depends(store)],
        key: Annotated[str | None, Depends(key_id)],
    ) -> FeedbackResponse:
        return kept.rate(body, key)

    return router
