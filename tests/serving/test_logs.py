"""The log: whole lines of JSON, whatever stands in them."""

import io
import json
import logging
import sys
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.http.logs import LOGGER, MAX_TEXT, configure_logging, log_request
from serving.service.request_context import RequestContext


def logged(**facts: Any) -> dict[str, Any]:
    stream = io.StringIO()
    configure_logging(stream)
    told: dict[str, Any] = {"method": "GET", "path": "/", "status": 200, "seconds": 0.25, "log_prompts": True}
    log_request(**{**told, **facts})
    text = stream.getvalue()
    assert text.endswith("\n") and text.count("\n") == 1 and len(text.splitlines()) == 1 and text.isascii()
    return dict(json.loads(text))


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=50), st.text(max_size=50))
def test_no_text_ends_its_line_or_its_field(path: str, prompt: str) -> None:
    line = logged(path=path, context=RequestContext(prompt=prompt))
    assert (line["path"], line["prompt"], line["status"]) == (path, prompt, 200)


def test_a_line_names_what_is_known_of_the_request_and_nothing_else() -> None:
    facts: dict[str, Any] = {
        "request_id": "r",
        "key_id": "k",
        "model": "m",
        "version": 3,
        "steps": 20,
        "n": 2,
    }
    line = logged(context=RequestContext(**facts, stream_status=504))
    assert line.pop("time").endswith("+00:00")
    assert line == facts | {
        "level": "info",
        "message": "request",
        "method": "GET",
        "path": "/",
        "status": 200,
        "seconds": 0.25,
    }


def test_prompts_stay_out_unless_told_otherwise() -> None:
    assert "prompt" not in logged(context=RequestContext(prompt="a"), log_prompts=False)


def test_long_texts_are_cut() -> None:
    assert len(logged(context=RequestContext(prompt="a" * 10_000))["prompt"]) == MAX_TEXT


def test_an_exception_is_part_of_its_line_with_its_end_kept() -> None:
    stream = io.StringIO()
    configure_logging(stream)
    try:
        raise ValueError("x\n" * 5000 + "the end")
    except ValueError:
        LOGGER.error("failed: %s", "a\nb", exc_info=sys.exc_info())
    line = json.loads(stream.getvalue())
    assert line["message"] == "failed: a\nb" and line["exception"].endswith("the end")
    assert stream.getvalue().count("\n") == 1


def test_nothing_is_written_twice_when_logging_is_configured_again() -> None:
    configure_logging(io.StringIO())
    logged(context=RequestContext())
    assert len(LOGGER.handlers) == 1 and not LOGGER.propagate
    configure_logging(io.StringIO(), logging.WARNING)
    assert not LOGGER.isEnabledFor(logging.INFO)
