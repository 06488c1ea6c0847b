"""Asking a running endpoint, by the commands of this room."""

import json
import urllib.error
import urllib.request
from typing import Any

KEY_VARIABLE = "DIFFRAY_KEY"  # of the environment: an API key for these commands


class EndpointError(RuntimeError):
    """The endpoint did not start or did not answer as it should.

    Attributes:
        retry_after_s: after which it would take the request, if it said so.
    """

    retry_after_s: float | None = None


def browsable(host: str, port: int) -> str:
    """The URL at which this machine reaches an endpoint that listens on `host`."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"http://{name}:{port}"


def call(
    url: str, body: dict[str, Any] | None = None, timeout_s: float = 60, *, key: str | None = None
) -> Any:
    """GET (or POST `body` as JSON) and return the JSON answer.

    Args:
        key: an API key, where the endpoint asks for one.

    Raises:
        EndpointError: if there is no answer, or an error; with the server's message.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data, headers)
    # Straight to the endpoint: a proxy of the environment would not reach this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            text = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = " ".join(text.split())[:200]
        failure = EndpointError(f"{url}: {error.code}: {text}")
        told = error.headers.get("Retry-After", "")
        failure.retry_after_s = float(told) if told.isdecimal() else None
        raise failure from None
    except (OSError, ValueError) as error:
        raise EndpointError(f"{url}: {error}") from None
