"""A job is followed to its end though the connection to its cluster is lost meanwhile."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.local import LocalCluster
from cluster.submit import run_job
from cluster.upload import runtime_environment


class Proxy:
    """Passes connections on to a cluster's Jobs API, until its cable is cut."""

    def __init__(self, address: str) -> None:
        self.behind = address.removeprefix("http://").split(":")
        self.open: list[socket.socket] = []
        self.port = 0
        self.mend()
        self.address = f"http://127.0.0.1:{self.port}"

    def mend(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, args=[self.listening], daemon=True).start()

    def cut(self) -> None:
        for each in [self.listening, *self.open]:
            with contextlib.suppress(OSError):  # closed by its other end
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self.open.clear()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = listening.accept()
                there = socket.create_connection((self.behind[0], int(self.behind[1])))
                self.open += [here, there]
                for one, other in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=[one, other], daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(ray_cluster: LocalCluster) -> Iterator[Proxy]:
    made = Proxy(ray_cluster.address)
    yield made
    made.cut()


COUNTING = """
import pathlib, sys, time
for number in range(24):
    print("line", number, flush=True)
    if number == 8:
        pathlib.Path(sys.argv[1]).touch()
    time.sleep(0.2)
sys.exit(5)
"""


def counting(folder: Path, proxy: Proxy, then: Callable[[], None]) -> list[str]:
    """A job that prints 24 lines; amid them the cable is cut."""
    half, program = folder / "half", folder / "counting.py"
    program.write_text(COUNTING)

    def disturb() -> None:
        while not half.exists():
            time.sleep(0.05)
        proxy.cut()
        then()

    threading.Thread(target=disturb, daemon=True).start()
    return [sys.executable, str(program), str(half)]


def test_a_lost_connection_is_taken_up_again_and_each_line_comes_once(
    proxy: Proxy, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = counting(tmp_path, proxy, lambda: threading.Timer(3, proxy.mend).start())
    assert run_job(proxy.address, command, runtime_environment()) == 5
    told = capfd.readouterr()
    assert told.out.splitlines() == [f"line {number}" for number in range(24)]
    lost, back = told.err.splitlines()
    assert lost.startswith("connection lost") and back.startswith("reconnected after")


def test_a_cluster_that_does_not_come_back_ends_with_75_and_says_how_to_go_on(
    proxy: Proxy, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.submit.LOST_S", 1)
    command = counting(tmp_path, proxy, lambda: None)
    assert run_job(proxy.address, command, runtime_environment()) == 75
    lost, error = capfd.readouterr().err.splitlines()
    assert lost.startswith("connection lost")
    assert (
        error.startswith(f"error: --address {proxy.address}: ")
        and "may still be running; to follow it: ray job logs" in error
    )
