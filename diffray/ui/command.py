"""Serve a page for a browser to train from: choose pictures, recipe and base, see the plan, start, watch.

    python -m diffray.ui.command
    python -m diffray.ui.command --folders photos /data/pictures --at-once 2
    python -m diffray.ui.command --host 0.0.0.0 --keys keys.json

Runs are those of the folder in which it is started, as `diffray.fit` and `diffray.run` know them. They go on
when the page or this command ends. It listens on this machine only; another --host needs --keys, a file that
`diffray keys add --keys FILE --scope admin` makes.
"""

import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from diffray.runs import LOCAL_HOSTS
from ray_jobs.config import ConfigError
from ray_jobs.console import complain, show
from ray_jobs.console.commands import command_parser

PORT = 8400


def serve(
    host: str, port: int, folders: list[str], keys: str | None, at_once: int, announce: Callable[[str], None]
) -> None:
    """Serve the page until an interrupt.

    Args:
        port: 0: a free one.
        folders: what the page may read.
        keys: file of keys; None: nobody needs one.
        at_once: runs on this machine at once.
        announce: function that is told the page's address.

    Raises:
        ConfigError: other machines would need no key, the address is in use, or another page is open for
            this folder.
    """
    import uvicorn

    from diffray.ui.access import Access
    from diffray.ui.data_folders import DataFolders
    from diffray.ui.page import Page
    from diffray.ui.queue import Queue
    from diffray.ui.server import create_app
    from serving.client import browsable
    from serving.http.api_keys import KeyRing

    is_local = host in LOCAL_HOSTS
    if not is_local and keys is None:
        raise ConfigError(
            f"--host {host}: other machines would reach the page, and could start programs here; make a key "
            "with `diffray keys add --keys FILE --name NAME --scope admin`, and give --keys FILE"
        )
    access = Access(KeyRing(Path(keys).expanduser()) if keys else None, is_local=is_local)
    readable = DataFolders(folders)
    with _listener(host, port) as listener:
        queue = Queue(at_once)
        try:
            queue.start()
            page = Page(readable, queue)
            threading.Thread(target=page.runs.all, name="first look", daemon=True).start()
            announce(browsable(host, listener.getsockname()[1]))
            settings = uvicorn.Config(
                create_app(page, access), log_level="warning", access_log=False, lifespan="off"
            )
            uvicorn.Server(settings).run(sockets=[listener])
        finally:
            queue.close()


def _listener(host: str, port: int) -> socket.socket:
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(address[0])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address[4])
        listener.listen()  # a browser that comes before the server waits
    except OSError as error:
        raise ConfigError(f"--host {host}, --port {port}: {error.strerror}; give another one") from None
    return listener


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code: 2 for an error that the user must fix."""
    parser = command_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine)")
    parser.add_argument("--port", type=int, default=PORT, help=f"port (default {PORT}; 0: a free one)")
    parser.add_argument(
        "--folders",
        nargs="+",
        default=["."],
        metavar="FOLDER",
        help="folders of pictures, or s3:// and gs:// addresses, that the page may read (default: this one)",
    )
    parser.add_argument("--keys", metavar="FILE", help="API keys that are asked for")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs at once on this machine")
    options = parser.parse_args(arguments)
    try:
        if options.at_once < 1:
            raise ConfigError(f"--at-once {options.at_once}: must be at least 1")
        serve(
            options.host,
            options.port,
            options.folders,
            options.keys,
            options.at_once,
            lambda address: show(f"page: {address} (Ctrl-C ends it; runs go on)"),
        )
    except ConfigError as error:
        return complain(error)
    except KeyboardInterrupt:
        show("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
