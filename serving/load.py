"""Load of an engine, and drift scores of its images, for metrics."""

from dataclasses import dataclass
from typing import NamedTuple


class EngineLoad(NamedTuple):
    """Current state of an engine, and its counters since it was created."""

    places: int  # slots for running rows
    waiting: int  # requests without a slot
    encoding: int  # rows with a slot whose initial image or references are not all encoded yet
    running: int  # rows being denoised
    decoding: int  # images and previews waiting to be decoded
    rejected: int  # requests rejected because the queue was full
    calls: int  # denoiser calls
    row_steps: int  # denoising steps of all rows in these calls
    pictures: int  # finished images
    first_steps: int  # rows that have made their first step
    seconds_to_first_step: float  # sum of these rows' waiting times
    prompt_hits: int
    prompt_misses: int
    adapter_hits: int
    adapter_misses: int
    adapter_bytes: int


@dataclass(frozen=True)
class DriftScores:
    """Drift scores of a full window. None: not measured, because an input is missing.

    Attributes:
        num_pictures: number of images in the window.
        fid: FID of the window against the validation images.
        expected_fid: FID of as many published images, with the validation prompts.
        near_copies: fraction of near copies of training images in the window, 0 to 1.
        expected_near_copies: fraction expected of a model that has memorised nothing.
        scored_at: time of scoring, seconds since 1970.
        num_passed_over: images not scored, because the queue was full or measuring failed.
    """

    num_pictures: int
    fid: float
    expected_fid: float | None
    clip_score: float | None
    near_copies: float | None
    expected_near_copies: float | None
    feature_network: str
    scored_at: float
    num_passed_over: int = 0
