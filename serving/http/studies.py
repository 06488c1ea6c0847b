"""Routes of user studies: the next pair for a rater, and its images. Votes go to `POST /v1/feedback`."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from ray_jobs.config import Config
from serving.feedback.store import FeedbackStore
from serving.feedback.studies import NextPair, folder_of, next_pair, require_study, votes_of
from serving.schemas import APIError, ErrorResponse


def studies_router(
    config: Config, store: Callable[..., FeedbackStore], key_id: Callable[..., str | None]
) -> APIRouter:
    """Make the router; arguments as for `feedback_router`."""
    router = APIRouter(tags=["feedback"])
    absent = {"model": ErrorResponse, "description": "The study or the image does not exist."}
    png = {"image/png": {"schema": {"type": "string", "format": "binary"}}}

    @router.get("/v1/feedback/studies/{name}", responses={404: absent})
    def study(
        name: str,
        kept: Annotated[FeedbackStore, Depends(store)],
        key: Annotated[str | None, Depends(key_id)],
    ) -> NextPair:
        """Return the pair of images that this key is to compare next."""
        found = require_study(config, name)
        return next_pair(found, votes_of(found, kept.votes()), key or "")

    @router.get(
        "/v1/feedback/studies/{name}/images/{image}",
        response_class=Response,
        responses={200: {"content": png}, 404: absent},
    )
    def image(name: str, image: str, key: Annotated[str | None, Depends(key_id)]) -> Response:
        """Return an image of a study, without metadata."""
        found = require_study(config, name)
        if image not in {each for item in found.items for each in item.images}:
            raise APIError(404, f"the study {name!r} has no image {image!r}", code="image_not_found")
        return Response(folder_of(config, name).read_bytes(f"{image}.png"), media_type="image/png")

    return router
