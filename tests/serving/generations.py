"""Generations and ratings to fill a feedback store with."""

from typing import Any

from serving.feedback.schemas import FeedbackRequest, Generation


def generation(number: int = 1, **fields: Any) -> Generation:
    known: dict[str, Any] = {
        "image_id": f"img-{number:024x}",
        "created": 1000.0 + number,
        "model": "served",
        "version": 3,
        "prompt": "a red apple",
        "seed": number,
        "steps": 4,
        "guidance_scale": 3.0,
        "size": "64x64",
        "seconds": 0.5,
    }
    return Generation.model_validate(known | fields)


def rated(number: int, rating: int | None = 1, **fields: Any) -> FeedbackRequest:
    return FeedbackRequest.model_validate({"image_id": f"img-{number:024x}", "rating": rating} | fields)
