"""An ASGI application behind a real HTTP server, for tests."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def http_server(app: Any, http: str = "auto") -> Iterator[str]:
    """Serve `app` by uvicorn in a thread; yields its URL.

    Args:
        http: uvicorn's implementation of HTTP: httptools or h11.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        settings: Any = {"http": http, "log_config": None, "access_log": False, "backlog": 4096}
        server = uvicorn.Server(uvicorn.Config(app, **settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def eventually(condition: Callable[[], Any], timeout_s: float = 10) -> None:
    """Wait until `condition` is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.005)
