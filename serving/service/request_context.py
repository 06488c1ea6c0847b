"""Request state shared by the HTTP layers and the service."""

from collections.abc import MutableMapping
from typing import Any

State = MutableMapping[str, Any]

ANONYMOUS = "anonymous"


def key_of(state: State) -> str | None:
    """Return the id of the request's API key; None if it has none."""
    key_id = state.get("key_id")
    return None if key_id == ANONYMOUS else key_id
