"""HTTP client of a running endpoint, for this package's commands."""

import json
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

KEY_VARIABLE = "DIFFRAY_KEY"  # environment variable with an API key for these commands


class EndpointError(RuntimeError):
    """The endpoint did not start, or did not answer as expected.

    Attributes:
        retry_after_s: seconds after which to retry, if the endpoint said so.
    """

    retry_after_s: float | None = None


def browsable(host: str, port: int) -> str:
    """Return the URL at which this machine reaches an endpoint that listens on `host`."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"http://{name}:{port}"


def call(
    url: str,
    body: Mapping[str, object] | None = None,
    timeout_s: float = 60,
    *,
    key: str | None = None,
    images: Sequence[bytes] = (),
    mask: bytes | None = None,
) -> Any:
    """Send GET (or POST `body` as JSON), and return the JSON answer.

    Args:
        key: API key, if the endpoint requires one.
        images: image files of an edit, with which the body is sent as a form.
        mask: file of the image's mask, transparent where it is to be painted.

    Raises:
        EndpointError: there is no answer, or it is an error; carries the server's message.
    """
    content_type, data = "application/json", None if body is None else json.dumps(body).encode()
    if images:
        content_type, data = _form(body or {}, images, mask)
    headers = {"Content-Type": content_type} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data, headers)
    # Bypass proxies from the environment, which would not reach this machine.
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
        seconds = error.headers.get("Retry-After", "")
        failure.retry_after_s = float(seconds) if seconds.isdecimal() else None
        raise failure from None
    except (OSError, ValueError) as error:
        raise EndpointError(f"{url}: {error}") from None


def _form(fields: Mapping[str, object], images: Sequence[bytes], mask: bytes | None) -> tuple[str, bytes]:
    """Return the content type and the body of an edit's form; fields that are None are left out."""
    boundary = uuid.uuid4().hex
    parts = [
        (f'name="{name}"', (value if isinstance(value, str) else json.dumps(value)).encode())
        for name, value in fields.items()
        if value is not None
    ]
    parts += [('name="image[]"; filename="image"', image) for image in images]
    parts += [] if mask is None else [('name="mask"; filename="mask.png"', mask)]
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"
        for head, content in parts
    )
    return f"multipart/form-data; boundary={boundary}", body + f"--{boundary}--\r\n".encode()
