"""An S3 server of this machine, which may refuse some of the writes."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import make_server

KEY, REGION = "testing", "us-east-1"

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Refusing:
    """A WSGI application that answers 503 to every n-th write, as a store does that is too busy.

    Attributes:
        refused: how many writes.
    """

    def __init__(self, application: Application, every: int) -> None:
        self.application, self.every, self.refused, self.number = application, every, 0, count(1)

    def __call__(self, request: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        writes = request["REQUEST_METHOD"] in ("PUT", "POST")
        if not writes or next(self.number) % self.every:
            return self.application(request, respond)
        self.refused += 1
        # A client that is still sending would miss the answer.
        request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
        respond("503 Slow Down", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]


@dataclass(frozen=True)
class S3Server:
    """One that holds an empty bucket.

    Attributes:
        endpoint: host:port.
    """

    endpoint: str
    bucket: str
    refusing: Refusing

    def address(self, path: str) -> str:
        """Of a path in the bucket, with the keys in it: the workers of a cluster that is up do not see this
        process's environment."""
        where = f"endpoint_override={self.endpoint}&scheme=http&region={REGION}"
        return f"s3://{KEY}:{KEY}@{self.bucket}/{path}?{where}"

    def filesystem(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(
            access_key=KEY,
            secret_key=KEY,
            region=REGION,
            endpoint_override=self.endpoint,
            scheme="http",
            allow_bucket_creation=True,
        )


@contextmanager
def s3_server(bucket: str, *, refuse_every: int = 0) -> Iterator[S3Server]:
    """Run a server while the block does.

    Args:
        refuse_every: of so many writes one; 0: none.
    """
    refusing = Refusing(DomainDispatcherApplication(create_backend_app), refuse_every or 1 << 62)
    server = make_server("127.0.0.1", 0, refusing, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        running = S3Server(f"127.0.0.1:{server.server_port}", bucket, refusing)
        running.filesystem().create_dir(bucket)
        yield running
    finally:
        server.shutdown()
        thread.join()
