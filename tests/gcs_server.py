"""A server of Google's storage on this machine."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
from pyarrow import fs


@dataclass(frozen=True)
class GcsServer:
    """One that holds an empty bucket.

    Attributes:
        endpoint: host:port.
    """

    endpoint: str
    bucket: str

    def address(self, path: str) -> str:
        """Of a path in the bucket."""
        options = f"scheme=http&endpoint_override={self.endpoint}&retry_limit_seconds=10"
        return f"gs://anonymous@{self.bucket}/{path}?{options}"

    def filesystem(self) -> fs.GcsFileSystem:
        return fs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=self.endpoint)


class Quiet(RequestHandler):
    def handle(self) -> None:
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has read what it wanted

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def gcs_server(bucket: str) -> Iterator[GcsServer]:
    """Run a server while the block does: a process, since pyarrow waits for it with the interpreter held."""
    command = [sys.executable, "-m", "tests.gcs_server", bucket]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield GcsServer(process.stdout.readline().strip(), bucket)
        process.stdin.close()


def main() -> None:
    """Serve until standard input ends. The emulator's own server answers one request after the other, and a
    client that reads slowly, as pyarrow does, would hold up its own next one."""
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(sys.argv[1], storage)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, storage))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
