"""The server's log: one JSON object per line, on one logger.

Nothing that a client sends can begin a line or end a field, because every value is encoded as ASCII JSON:
line ends, terminal escapes and text direction marks become \\u escapes. Long texts are truncated.
"""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

from serving.service.request_context import RequestContext

LOGGER = logging.getLogger("diffray.serving")

MAX_TEXT = 2000
"""Maximum characters per value."""

LOGGED = ("request_id", "key_id", "model", "version", "alias", "steps", "n", "reason")
"""Facts about a request that its log line holds."""


class JSONFormatter(logging.Formatter):
    """Format a record as one line: time (UTC), level, message, then the `fields` given in `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] = getattr(record, "fields", {})
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # Keep the end of a traceback, which names the error.
        cut = {name: _cut(value, keep_end=name == "exception") for name, value in line.items()}
        return json.dumps(cut, ensure_ascii=True, default=str)


def _cut(value: object, *, keep_end: bool) -> object:
    if not isinstance(value, str):
        return value
    return value[-MAX_TEXT:] if keep_end else value[:MAX_TEXT]


def configure_logging(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Make the logger write to `stream` (default: stderr) only."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JSONFormatter())
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level)
    LOGGER.propagate = False


def log_request(
    *,
    method: str,
    path: str,
    status: int,
    seconds: float,
    context: RequestContext,
    log_prompts: bool,
    level: int = logging.INFO,
) -> None:
    """Log one line about a request that has ended.

    Args:
        status: HTTP status; 499 if the client left before the answer was complete.
        seconds: time from the first byte of the request to the last byte of the answer.
        context: facts about the request, of which those are logged that are known.
        log_prompts: log the prompt.
    """
    facts = {name: getattr(context, name) for name in (*LOGGED, *(("prompt",) if log_prompts else ()))}
    facts = {name: value for name, value in facts.items() if value is not None}
    fields = {"method": method, "path": path, "status": status, "seconds": round(seconds, 4), **facts}
    LOGGER.log(level, "request", extra={"fields": fields})
