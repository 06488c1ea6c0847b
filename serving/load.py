"""What an engine is doing, and how its pictures are, for metrics."""

from typing import NamedTuple


class Load(NamedTuple):
    """What the engine is doing, and has done since it was made."""

    places: int  # for rows that are drawn at a time
    waiting: int  # requests that have no place yet
    encoding: int  # rows that have a place, and whose given picture is not encoded yet
    running: int  # rows between their first step and their last
    decoding: int  # pictures and previews after that
    rejected: int  # requests, because too many were waiting
    calls: int  # of the denoiser
    row_steps: int  # steps of all rows in these calls
    pictures: int  # finished
    first_steps: int  # rows that took one,
    seconds_to_first_step: float  # and how long they had waited for it, all together
    prompt_hits: int
    prompt_misses: int
    adapter_hits: int
    adapter_misses: int
    adapter_bytes: int


class Drift(NamedTuple):
    """The scores of a full window. None: not measured, for want of what it needs.

    Attributes:
        num_pictures: in the window.
        fid: of the window against the validation pictures.
        expected_fid: that as many of the published pictures had, with the validation's prompts.
        near_copies: share of the window, 0 to 1.
        expected_near_copies: that a model which has learnt nothing by heart would have.
        scored_at: seconds since 1970.
        num_passed_over: pictures that came faster than they could be measured, or could not be.
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
