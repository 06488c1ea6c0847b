"""Forms with files (multipart/form-data, RFC 7578), in which OpenAI's clients send images."""

from email.message import Message
from email.parser import BytesHeaderParser

from serving.schemas import APIError


def form_fields(content_type: str, body: bytes) -> list[tuple[str, bytes]]:
    """Parse a form into its fields in their order, each a name and its content.

    Raises:
        APIError: 400, the form is invalid.
    """
    header = Message()
    header["Content-Type"] = content_type
    boundary = _parameter(header, "boundary", "Content-Type")
    if header.get_content_type() != "multipart/form-data" or boundary is None:
        raise _invalid("send the fields as multipart/form-data")
    # RFC 2046, 5.1.1: a delimiter is a separate line, which must not occur in any part.
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"))
    last = parts.pop() if parts else b""
    if not last.startswith(b"--"):
        raise _invalid("the form is incomplete: its closing boundary is missing")
    fields: list[tuple[str, bytes]] = []
    for part in parts:
        head, mark, content = part.partition(b"\r\n\r\n")
        name = _parameter(BytesHeaderParser().parsebytes(head.lstrip()), "name", "Content-Disposition")
        if not mark or name is None:
            raise _invalid("a part of the form has no name")
        fields.append((name, content))
    return fields


def _parameter(message: Message, name: str, header: str) -> str | None:
    """Return a header's parameter; None if it is missing or not plain text."""
    try:
        value = message.get_param(name, header=header)
    except TypeError:  # the library compares numbered parts of a parameter (RFC 2231) with unnumbered ones
        return None
    return value if isinstance(value, str) else None


def _invalid(reason: str) -> APIError:
    return APIError(400, reason, code="invalid_form")
