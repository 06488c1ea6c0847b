"""Forms with files (multipart/form-data, RFC 7578), in which OpenAI's clients send pictures."""

from email.message import Message
from email.parser import BytesHeaderParser

from serving.schemas import APIError


def form_fields(content_type: str, body: bytes) -> dict[str, bytes]:
    """The fields of a form by name; of a name that stands there twice, an error.

    Raises:
        APIError: 400, it is no such form.
    """
    header = Message()
    header["Content-Type"] = content_type
    boundary = _parameter(header, "boundary", "Content-Type")
    if header.get_content_type() != "multipart/form-data" or boundary is None:
        raise _invalid("send the fields as multipart/form-data")
    # RFC 2046, 5.1.1: a delimiter is a line of its own, which no part may hold.
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"))
    last = parts.pop() if parts else b""
    if not last.startswith(b"--"):
        raise _invalid("the form has no end")
    fields: dict[str, bytes] = {}
    for part in parts:
        head, mark, content = part.partition(b"\r\n\r\n")
        name = _parameter(BytesHeaderParser().parsebytes(head.lstrip()), "name", "Content-Disposition")
        if not mark or name is None:
            raise _invalid("a part of the form has no name")
        if name in fields:
            raise APIError(400, f"{name}: given more than once", name, "invalid_value")
        fields[name] = content
    return fields


def _parameter(message: Message, name: str, header: str) -> str | None:
    """A parameter of a header; None where there is none in plain text."""
    try:
        found = message.get_param(name, header=header)
    except TypeError:  # the library compares parts of a parameter (RFC 2231) with ones that have no number
        return None
    return found if isinstance(found, str) else None


def _invalid(reason: str) -> APIError:
    return APIError(400, reason, code="invalid_form")
