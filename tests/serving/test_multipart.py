"""Forms with files are read as httpx and OpenAI's clients write them."""

import random

import httpx
import pytest

from serving.http.multipart import form_fields
from serving.schemas import APIError


def written(fields: dict[str, str], files: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    request = httpx.Request("POST", "http://a", data=fields, files=files)
    return request.headers["Content-Type"], request.read()


@pytest.mark.parametrize("seed", range(20))
def test_fields_and_files_come_back_byte_for_byte(seed: int) -> None:
    content = b"\r\n--" + random.Random(seed).randbytes(3000) + b"\r\n\r\n--\r\n" * (seed % 3)
    files = [("image[]", content), ("image[]", content[::-1])]
    assert form_fields(*written({"prompt": "ein Apfel für äh"}, files)) == [
        ("prompt", "ein Apfel für äh".encode()),
        *files,
    ]


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"--a--"),
        ("multipart/form-data; boundary=a", b""),
        ("multipart/form-data; boundary=a", b"--a\r\nContent-Disposition: form-data; name=x\r\n\r\ny"),
        ("multipart/form-data; boundary=a", b"--a\r\n\r\ny\r\n--a--"),
        ("multipart/form-data; boundary*=a; boundary*0=b", b"--a--"),
        (
            "multipart/form-data; boundary=a",
            b"--a\r\nContent-Disposition: form-data; name*=x; name*0=y\r\n\r\nz\r\n--a--",
        ),
    ],
)
def test_what_is_no_form_is_refused(content_type: str, body: bytes) -> None:
    with pytest.raises(APIError) as refused:
        form_fields(content_type, body)
    assert (refused.value.status, refused.value.code) == (400, "invalid_form")
