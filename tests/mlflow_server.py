"""An MLflow server of this machine, on a SQLite file."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from cluster.sqlite import sqlite_url

BEGINS_WITHIN_S = 300


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Run `mlflow server` with its database and artifacts in `folder` while the block does; yield its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    store = ["--backend-store-uri", sqlite_url(folder / "server.db"), "--artifacts-destination", str(folder)]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--port", str(port), "--workers", "1"]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, env=os.environ | quiet, stdout=file, stderr=file, cwd=folder, start_new_session=True
        ) as server,
    ):
        try:
            deadline = time.monotonic() + BEGINS_WITHIN_S
            while not _answers(url):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield url
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # its workers too


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.ConnectionError:
        return False
