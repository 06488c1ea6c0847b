"""What clients do to the endpoint, and what happens to its disk and its database: without Ray, over HTTP."""

import asyncio
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.feedback.database import open_database
from serving.feedback.store import FeedbackStore
from serving.request import Request, ScaledAdapter
from tests.faults.conftest import fill
from tests.postgresql import PostgreSQL, programs
from tests.record import record_fault
from tests.serving.conftest import save_adapters, wait_until
from tests.serving.endpoint_here import EndpointHere, endpoint_here
from tests.serving.generations import generation

MIB = 2**20


@pytest.fixture(scope="module")
def here(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EndpointHere]:
    serve: dict[str, Any] = {
        "max_queued_requests": 4000,
        "concurrent_requests": 4000,
        "request_timeout_s": 20,
    }
    with endpoint_here(tmp_path_factory.mktemp("here"), tiny_model, **serve) as endpoint:
        yield endpoint


def asked(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json={"prompt": "a", **body}, timeout=60)


def test_a_full_disk_refuses_addresses_and_jobs_and_loses_no_record(
    disk: Path,
    tiny_model: Path,
) -> None:
    with endpoint_here(disk / "runs", tiny_model) as endpoint:
        assert asked(endpoint.url, response_format="url").status_code == 200
        endpoint.store.flush()
        filler = fill(disk, leave=0)
        refused = asked(endpoint.url, response_format="url")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
        assert str(disk) not in refused.text
        later = httpx.post(
            f"{endpoint.url}/v1/images/generations", json={"prompt": "a"}, headers={"Prefer": "respond-async"}
        )
        assert (later.status_code, later.json()["error"]["code"]) == (503, "storage_unavailable")
        drawn = [asked(endpoint.url) for _ in range(3)]  # what needs no disk is answered meanwhile
        assert {each.status_code for each in drawn} == {200}
        filler.unlink()
        freed = time.monotonic()
        ids = [each.json()["data"][0]["id"] for each in drawn]
        wait_until(lambda: len(endpoint.store.generations(ids)) == 3)
        took = time.monotonic() - freed
        assert asked(endpoint.url, response_format="url").status_code == 200
    record_fault(
        "the disk of addresses and feedback is full", recovery_s=took, lost="no record; 2 requests refused"
    )


def test_a_database_server_that_is_killed_loses_no_record(tiny_model: Path, tmp_path: Path) -> None:
    if (found := programs()) is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with PostgreSQL.made(found) as server:
        store = FeedbackStore(open_database(server.url))
        for number in range(1, 51):
            store.record(generation(number))
        server.kill()
        killed = time.monotonic()
        for number in range(51, 101):
            store.record(generation(number))  # waits in memory
        server.start()
        ids = [f"img-{number:024x}" for number in range(1, 101)]

        def known() -> bool:
            try:
                return len(store.generations(ids)) == 100
            except Exception:
                return False

        wait_until(known)
        took = time.monotonic() - killed
        store.close()
    record_fault("kill -9 of the feedback database's server", recovery_s=took, lost="no record")


def test_a_thousand_adapters_in_turn_stay_within_their_memory(tiny_model: Path, tmp_path: Path) -> None:
    """Also in mixtures, whose rows hold what the cache has dropped."""
    folder = save_adapters(tiny_model, tmp_path / "adapter", seed=1)
    copies = {f"copy {number}" for number in range(1000)}
    engine = Engine(
        load_pipeline(str(tiny_model)),
        adapter_folder=lambda name: folder if name in copies else tmp_path,
        adapter_bytes=5 * sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )
    process, memory = psutil.Process(), []
    names = sorted(copies)
    for number in range(0, 1000, 4):
        single, one, other, third = names[number : number + 4]
        mixture = (ScaledAdapter(one, 0.5), ScaledAdapter(other, -1.0), ScaledAdapter(third, 0.1))
        futures = [
            engine.submit(Request("a", 0, 1, 1.0, adapter=single)),
            engine.submit(Request("a", 0, 1, 1.0, adapters=mixture)),
        ]
        engine.drain()
        assert all(each.result(0) for each in futures)
        assert engine.load().adapter_bytes <= engine.adapters.max_bytes  # type: ignore[union-attr]
        memory.append(process.memory_info().rss)
    grown = (max(memory[-20:]) - max(memory[50:70])) / MIB
    assert grown < 8, f"{grown:.1f} MiB more after 1,000 adapters than after 280"
    record_fault("1,000 adapters in turn, with room for 5", recovery_s=None, lost=f"{grown:.1f} MiB")


def test_clients_that_send_and_read_a_byte_a_second_keep_nobody_waiting(here: EndpointHere) -> None:
    host, port = re.fullmatch(r"http://(.*):(\d+)", here.url).groups()  # type: ignore[union-attr]
    body = b'{"prompt": "a"}'
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with ExitStack() as sockets:
        slow = [sockets.enter_context(socket.create_connection((host, int(port)))) for _ in range(100)]
        for each in slow[:50]:  # they send slowly
            each.sendall(head + b"content-length: 1000\r\n\r\n{")
        for each in slow[50:]:  # they read slowly
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            each.sendall(head + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        took = []
        deadline = time.monotonic() + 22
        while time.monotonic() < deadline:
            begun = time.monotonic()
            assert asked(here.url, steps=1).status_code == 200
            took.append(time.monotonic() - begun)
            for each in slow[:50]:
                try:
                    each.sendall(b" ")
                except OSError:
                    continue  # it was told, and its connection closed
            for each in slow[50:]:
                each.recv(1)
            time.sleep(max(0.0, 1 - (time.monotonic() - begun)))
        for each in slow[:50]:
            each.settimeout(20)
            assert b" 408 " in each.recv(1000).partition(b"\r\n")[0]
    typical = sorted(took)[len(took) // 2]
    assert typical < 5
    record_fault("100 clients that send or read a byte a second", recovery_s=typical, lost="theirs, with 408")


def test_a_thousand_clients_that_leave_leave_nothing_behind(here: EndpointHere) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60) as client:
            body = {"prompt": "a", "steps": 100}
            asking = [
                asyncio.create_task(client.post(f"{here.url}/v1/images/generations", json=body))
                for _ in range(1000)
            ]
            await asyncio.sleep(3)
            for each in asking:
                each.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    asyncio.run(leave())
    left = time.monotonic()

    def number(name: str) -> float:
        text = httpx.get(f"{here.url}/metrics", timeout=60).text
        return float(re.search(rf"^{name} (\S+)$", text, re.M).group(1))  # type: ignore[union-attr]

    wait_until(lambda: number("diffray_open_requests") == 0 and number("diffray_rows_running") == 0, 120)
    assert number("diffray_queue_length") == 0
    took = time.monotonic() - left
    with ThreadPoolExecutor(4) as pool:
        assert {each.status_code for each in pool.map(lambda _: asked(here.url), range(8))} == {200}
    record_fault("1,000 clients ask and leave", recovery_s=took, lost="theirs alone")
