"""What the server writes about itself: one JSON object a line, on one logger.

Nothing that a client sends can begin a line or end a field, because every value goes through JSON, in ASCII:
line ends, terminal escapes and directions of writing come out as \\u escapes. Long texts are cut.
"""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

LOGGER = logging.getLogger("diffray.serving")

MAX_TEXT = 2000
"""Characters of a value."""

REQUEST_FACTS = ("model", "version", "alias", "steps", "n", "reason")
"""What the application may put into `request.state` about a request, for its log line."""


class JSONFormatter(logging.Formatter):
    """A record as one line: time (UTC), level, message, then the `fields` given in `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # The end of a traceback is what tells.
        cut = {
            name: value[-MAX_TEXT:] if name == "exception" else _cut(value) for name, value in line.items()
        }
        return json.dumps(cut, ensure_ascii=True, default=str)


def _cut(value: Any) -> Any:
    return value[:MAX_TEXT] if isinstance(value, str) else value


def configure_logging(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Let the logger write to `stream` (stderr if none is given), and nowhere else."""
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
    state: Mapping[str, Any],
    log_prompts: bool,
    level: int = logging.INFO,
) -> None:
    """One line about a request that has ended.

    Args:
        status: of HTTP; 499 where the client left before its answer was complete.
        seconds: from its first byte here to the last of the answer.
        state: the request's, with `request_id`, `key_id`, REQUEST_FACTS and `prompt` as far as known.
        log_prompts: whether the prompt is written.
    """
    known = ("request_id", "key_id", *REQUEST_FACTS, *(("prompt",) if log_prompts else ()))
    facts = {name: state[name] for name in known if state.get(name) is not None}
    fields = {"method": method, "path": path, "status": status, "seconds": round(seconds, 4), **facts}
    LOGGER.log(level, "request", extra={"fields": fields})
