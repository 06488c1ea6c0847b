"""State of a request that the HTTP layers and the service share."""

from collections.abc import MutableMapping
from typing import Any

State = MutableMapping[str, Any]

ANONYMOUS = "anonymous"


def key_of(state: State) -> str | None:
    """The API key of a request; None if it has none."""
    key_id = state.get("key_id")
    return None if key_id == ANONYMOUS else key_id
