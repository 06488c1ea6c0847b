"""The endpoint of a run, and the pictures that it draws."""

import base64
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from diffray.jobs import Job, Status
from diffray.notebook import Live, is_notebook
from diffray.settings import config_of
from ray_jobs.config import Config
from serving.client import KEY_VARIABLE, EndpointError, browsable, call

if TYPE_CHECKING:
    from PIL import Image

    Given = str | os.PathLike[str] | bytes | Image.Image

START_S = 900
"""Timeout of an endpoint's start, in seconds; large models are read for minutes."""


class Endpoint:
    """An endpoint that `Run.deploy` started. Its key, if it asks for one, is read from DIFFRAY_KEY."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @property
    def config(self) -> Config:
        """Its configuration."""
        return config_of(self.job.started.arguments)

    @property
    def url(self) -> str:
        """Its address, on which the page and the OpenAI-compatible API answer."""
        record, serve = self.job.started, self.config.serve
        host = urlsplit(record.address).hostname if record.address else serve.host
        return browsable(host or serve.host, serve.port)

    @property
    def status(self) -> Status:
        """running, failed or stopped."""
        return self.job.status

    def wait_until_ready(self) -> None:
        """Return once the endpoint answers. A notebook shows its last line meanwhile.

        Raises:
            EndpointError: it ends before, with its last line, or does not answer in time.
        """
        live = Live(self._shown) if is_notebook() else None
        deadline = time.monotonic() + START_S
        while True:
            if live:
                live.update()
            if self.status != "running":
                raise EndpointError(f"the endpoint did not start: {self.job.last_line()}")
            try:
                call(f"{self.url}/readyz", timeout_s=10)
                return
            except EndpointError:
                if time.monotonic() > deadline:
                    self.job.stop()
                    raise
                time.sleep(1)

    def _shown(self) -> list[str]:
        from diffray.shown import run_state

        return [run_state(self.url, self.status, self.job.last_line(), "")]

    def draw(
        self,
        prompt: str,
        *,
        images: "Given | Sequence[Given]" = (),
        mask: "Given | None" = None,
        control: "Given | None" = None,
        n: int = 1,
        seed: int | None = None,
        **fields: Any,
    ) -> "Pictures":
        """Return `n` pictures of a prompt, shown where a notebook shows a cell's value.

        Args:
            images: pictures to draw from, an edit, or one: paths, contents of files, or PIL pictures.
            mask: a PNG of the first image's size, transparent where it is to be painted.
            control: image that the model's ControlNet follows, for example edges; `control_scale=0.5` among
                the fields lets it count half.
            fields: further fields of the request, as `steps`, `negative_prompt` or, with `images`, `strength`
                (docs/serving.md).

        Raises:
            OSError: a path cannot be read.
            TypeError: `stream` or `response_format` is given, which say how a program gets the pictures.
            EndpointError: the endpoint does not answer, or refuses the request, with its message.
        """
        from PIL import Image

        if of_programs := {"stream", "response_format"}.intersection(fields):
            raise TypeError(f"{', '.join(sorted(of_programs))}: leave out; draw returns the pictures")
        given = [images] if isinstance(images, str | os.PathLike | bytes | Image.Image) else images
        files = [_file_of(image) for image in given]
        body = {"prompt": prompt, "n": n, **({} if seed is None else {"seed": seed}), **fields}
        if control is not None:
            body["control_image"] = base64.b64encode(_file_of(control)).decode()
        timeout = self.config.serve.request_timeout_s + 10
        path, key = "edits" if files else "generations", os.environ.get(KEY_VARIABLE)
        hole = None if mask is None else _file_of(mask)
        answer = call(f"{self.url}/v1/images/{path}", body, timeout, key=key, images=files, mask=hole)
        contents = [base64.b64decode(each["b64_json"]) for each in answer["data"]]
        return Pictures(Image.open(io.BytesIO(content)) for content in contents)

    def delete(self) -> None:
        """Stop the endpoint."""
        self.job.stop()
        self.job.forget()

    def __repr__(self) -> str:
        return f"<Endpoint {self.url}: {self.status}>"


def _file_of(image: "Given") -> bytes:
    """Return an image file's content; a PIL picture becomes a PNG."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class Pictures(list["Image.Image"]):
    """A list of PIL pictures that a notebook shows."""

    def _repr_html_(self) -> str:
        from diffray.shown import pictures

        return pictures(self)
