"""Who may ask, and how much, over real HTTP: an application of the tests' own behind the layer."""

import asyncio
import io
import json
import pickle
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.background import BackgroundTask

from ray_jobs.config import ServeConfig
from serving.http.access import Access, client_of, needed_scope
from serving.http.api import EventStream, _answer_error
from serving.http.api_keys import KeyRing, Scope, add_key, digest
from serving.http.asgi_exchange import context_of
from serving.http.limits import ConcurrencyLimit
from serving.http.logs import configure_logging
from serving.schemas import APIError, PartialImageEvent
from serving.service.metrics import Metrics
from tests.serving.http_server import eventually, http_server

DRAW = "/v1/images/generations"


@dataclass
class Server:
    """The application, what it saw, and how to ask it."""

    path: Path
    log: io.StringIO
    metrics: Metrics = field(default_factory=lambda: Metrics(max_queued_requests=4, min_replicas=1))
    concurrency: ConcurrencyLimit = field(default_factory=ConcurrencyLimit)
    events: list[str] = field(default_factory=list)
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop | None = None
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=20))

    def key(self, *scopes: Scope, **limits: Any) -> dict[str, str]:
        """The headers of a new key."""
        return {"Authorization": f"Bearer {add_key(self.path, 'test', frozenset(scopes), **limits)}"}

    def open(self) -> None:
        """Let those go on that wait "until opened"."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.opened.set)

    def lines(self) -> list[dict[str, Any]]:
        """The log."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def application(self) -> FastAPI:
        """Draws nothing: it reads bodies, waits, streams and fails as it is told to."""
        api, events = FastAPI(), self.events
        late_error = APIError(504, "not drawn in time", code="timeout")
        failed = APIError(500, "image generation failed: a secret of the server", code="drawing_failed")

        api.add_exception_handler(APIError, _answer_error)

        @api.post(DRAW)
        async def draw(request: Request) -> Any:
            told = await request.json()
            context = context_of(request.scope)
            context.model, context.version = "diffray", 3
            context.alias, context.prompt = "champion", told.get("prompt")
            if told.get("fail") == "full":
                raise APIError(503, "full", code="queue_full")
            if told.get("fail") == "drawing":
                raise failed
            if told.get("fail"):
                raise ZeroDivisionError("a secret of the server")
            self.loop = asyncio.get_running_loop()
            events.append("began")
            if told.get("late"):
                error = failed if told["late"] == "drawing" else late_error
                return await EventStream.of(broken(error), context)
            if told.get("stream"):
                return StreamingResponse(parts(told["stream"], told), media_type="text/event-stream")
            try:
                await asyncio.sleep(told.get("wait", 0))
                if told.get("until opened"):
                    await self.opened.wait()
            except asyncio.CancelledError:
                events.append("cancelled")
                raise
            late = BackgroundTask(later, told["later"]) if "later" in told else None
            return JSONResponse({"key_id": context.key_id}, background=late)

        async def broken(error: APIError) -> AsyncGenerator[PartialImageEvent]:
            yield PartialImageEvent(b64_json="", created_at=0, size="8x8", partial_image_index=0)
            raise error

        async def later(seconds: float) -> None:
            await asyncio.sleep(seconds)
            events.append("done later")

        async def parts(count: int, told: dict[str, Any]) -> AsyncIterator[str]:
            number = 0
            try:
                for number in range(count):
                    yield f"data: {number}\n\n"
                    await asyncio.sleep(0.05)
                    if told.get("until opened"):
                        await self.opened.wait()
                    if told.get("break"):
                        raise ZeroDivisionError
            finally:
                events.append(f"streamed {number + 1}")

        @api.api_route("/{path:path}", methods=["GET", "POST"], include_in_schema=False)
        async def other(request: Request) -> dict[str, Any]:
            body = await request.body()
            return {"bytes": len(body), "sum": sum(body), "request_id": context_of(request.scope).request_id}

        return api


@contextmanager
def serving(tmp_path: Path, http: str = "auto", **settings: Any) -> Iterator[Server]:
    with ExitStack() as stack:
        server = Server(tmp_path / "keys.json", io.StringIO())
        configure_logging(server.log)
        server.key("generate")
        config = ServeConfig(max_body_mb=1, **{"keys": str(server.path), **settings})
        api = server.application()
        api.add_middleware(
            Access,
            settings=config,
            keys=KeyRing.of(config),
            metrics=server.metrics,
            concurrency=server.concurrency,
        )
        url = stack.enter_context(http_server(api, http))
        stack.enter_context(server.client)
        server.client.base_url = httpx.URL(url)
        yield server


@pytest.fixture(params=["httptools", "h11"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path, request.param) as server:
        yield server


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def anonymous(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path, keys=None, allow_anonymous=True, concurrent_requests=2) as server:
        yield server


def error_of(answer: httpx.Response) -> dict[str, Any]:
    (name, error), *rest = answer.json().items()
    assert name == "error" and not rest and set(error) == {"message", "type", "param", "code"}
    return dict(error)


@contextmanager
def raw(server: Server, headers: dict[str, str], body: bytes) -> Iterator[socket.socket]:
    """A connection on which a request was sent, to be closed whenever the test likes."""
    address = urlsplit(str(server.client.base_url))
    head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "test", **headers}.items())
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(f"POST {DRAW} HTTP/1.1\r\n{head}\r\n".encode() + body)
        yield connection


def sample(server: Server, name: str, **labels: str) -> float | None:
    return server.metrics.registry.get_sample_value(name, labels)


# Keys


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Basic YTpi", "Bearer wrong", "Bearer \xe9"])
def test_without_a_key_of_this_server_the_answer_is_401(server: Server, authorization: str | None) -> None:
    headers = [(b"authorization", authorization.encode("latin-1"))] if authorization is not None else []
    answer = server.client.post(DRAW, headers=headers, json={})
    assert answer.status_code == 401 and not server.events
    assert answer.headers["www-authenticate"].startswith('Bearer realm="diffray"')
    assert error_of(answer)["code"] == "invalid_api_key"
    assert sample(server, "diffray_rejected_requests_total", reason="invalid_api_key") == 1


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_site_does_not_use_a_server_that_asks_for_no_key(
    anonymous: Server, plain: Server, site: str
) -> None:
    told = {"Sec-Fetch-Site": site}
    form = {"image": b"a picture"}
    refused = anonymous.client.post("/v1/images/edits", files=form, headers=told)
    assert refused.status_code == 403 and not anonymous.events
    for own in ("same-origin", "none"):
        assert anonymous.client.post(DRAW, json={}, headers={"Sec-Fetch-Site": own}).status_code == 200
    with_key = plain.key("generate") | told  # a key no browser sends by itself
    assert plain.client.post(DRAW, json={}, headers=with_key).status_code == 200


def test_a_key_is_named_to_the_application(plain: Server) -> None:
    headers = plain.key("generate")
    answer = plain.client.post(DRAW, headers=headers, json={})
    assert answer.json() == {"key_id": headers["Authorization"].split("-")[1]}


def test_the_scheme_of_authorization_is_not_case_sensitive(plain: Server) -> None:
    token = plain.key("generate")["Authorization"].removeprefix("Bearer ")
    assert plain.client.post(DRAW, headers={"Authorization": f"bearer {token}"}, json={}).status_code == 200


@pytest.mark.parametrize(
    "method, path, scope",
    [
        ("POST", DRAW, "generate"),
        ("GET", "/v1/models", "generate"),
        ("POST", "/v1/feedback", "feedback"),
        ("GET", "/v1/feedback/export", "feedback"),
        ("GET", "/v1/feedbacks", "generate"),
        ("GET", "/v1/rollout", "admin"),
        ("POST", "/v1/rollout/promote", "admin"),
        ("GET", "/v1/admin", "admin"),
        ("GET", "/v1/adminstuff", "admin"),
        ("GET", "/metrics", "admin"),
        ("GET", "/v1", "admin"),
        ("GET", "//v1/models", "admin"),
        ("GET", "/nobody/thought/of/this", "admin"),
        ("GET", "/docs", "admin"),
    ],
)
def test_every_path_needs_its_scope_and_no_other_will_do(
    plain: Server, method: str, path: str, scope: Scope
) -> None:
    others: set[Scope] = {"generate", "feedback", "admin"} - {scope}  # type: ignore[assignment]
    url = f"{str(plain.client.base_url).rstrip('/')}{path}"
    refused = plain.client.request(method, url, headers=plain.key(*others), json={})
    assert refused.status_code == 403 and error_of(refused)["code"] == "insufficient_scope"
    assert f'scope="{scope}"' in refused.headers["www-authenticate"]
    assert plain.client.request(method, url, json={}).status_code == 401
    assert plain.client.request(method, url, headers=plain.key(scope), json={}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/openapi.json", "/web/page.js"])
def test_probes_documents_and_the_page_need_no_key_and_take_no_body(plain: Server, path: str) -> None:
    assert plain.client.get(path).status_code == 200
    assert plain.client.post(path, content=b"x").status_code == 413


def test_the_openai_client_raises_its_own_errors(plain: Server) -> None:
    address = str(plain.client.base_url.join("/v1"))
    with (
        openai.OpenAI(base_url=address, api_key="sk-wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as error,
    ):
        stranger.images.generate(prompt="a cat")
    assert error.value.code == "invalid_api_key" and error.value.request_id
    token = plain.key("generate", requests_per_minute=1)["Authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=address, api_key=token, max_retries=0) as client:
        client.images.generate(prompt="a cat")
        with pytest.raises(openai.RateLimitError) as limited:
            client.images.generate(prompt="a cat")
    assert limited.value.code == "rate_limit_exceeded"


# Anonymous use


def test_anonymous_clients_may_do_everything_when_told_so(anonymous: Server) -> None:
    assert anonymous.client.post(DRAW, json={}).json() == {"key_id": "anonymous"}
    for path in ("/metrics", "/v1/rollout", "/v1/feedback", "/v1/models"):
        assert anonymous.client.get(path).status_code == 200
    # OpenAI's client cannot do without a key, so any will do where there are none.
    assert anonymous.client.get("/v1/models", headers={"Authorization": "Bearer any"}).status_code == 200


def test_anonymous_clients_are_limited_by_their_address(tmp_path: Path) -> None:
    with serving(tmp_path, allow_anonymous=True, requests_per_minute=2) as server:
        statuses = [server.client.post(DRAW, json={}).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        keyed = server.client.post(DRAW, json={}, headers=server.key("generate"))
        assert keyed.status_code == 200, "a key has limits of its own"


def test_a_wrong_key_is_refused_even_where_none_is_needed(tmp_path: Path) -> None:
    with serving(tmp_path, allow_anonymous=True) as server:
        assert server.client.get("/v1/models").status_code == 200
        assert server.client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:0:0:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("testclient", "another", False),
    ],
)
def test_a_client_is_an_address_or_a_network_of_one_owner(one: str, other: str, same: bool) -> None:
    assert (client_of({"client": (one, 1)}) == client_of({"client": (other, 2)})) is same


# Request ids


@pytest.mark.parametrize("told", ["my-request_1.2", "a" * 64])
def test_a_sane_request_id_is_kept(plain: Server, told: str) -> None:
    answer = plain.client.get("/web/a", headers={"X-Request-ID": told})
    assert answer.headers.get_list("x-request-id") == [told] and answer.json()["request_id"] == told


@pytest.mark.parametrize("told", [None, "", "a" * 65, "a b", '"}', "\xe9"])
def test_another_one_is_replaced(plain: Server, told: str | None) -> None:
    headers = [(b"x-request-id", told.encode("latin-1"))] if told is not None else []
    answer = plain.client.get("/web/a", headers=headers)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


# Bodies


def test_a_body_arrives_as_it_was_sent(server: Server) -> None:
    body = bytes(range(256)) * 4096  # exactly the limit
    expected = {"bytes": len(body), "sum": sum(body)}
    for content in (body, iter([body[:7], body[7:300_000], b"", body[300_000:]])):
        answer = server.client.post("/v1/feedback", content=content, headers=server.key("feedback")).json()
        assert {name: answer[name] for name in expected} == expected


def test_a_body_that_is_too_large_is_refused_by_its_length(server: Server) -> None:
    answer = server.client.post(DRAW, content=bytes((1 << 20) + 1), headers=server.key("generate"))
    assert answer.status_code == 413 and error_of(answer)["code"] == "request_too_large"


def test_a_body_that_does_not_tell_its_length_is_refused_as_soon_as_it_is_too_large(server: Server) -> None:
    headers = {**server.key("generate"), "Transfer-Encoding": "chunked"}
    chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    with raw(server, headers, chunk * 17) as connection:  # and its end never comes
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")
    assert not server.events
    eventually(lambda: len(server.concurrency) == 0)


def test_a_body_that_does_not_come_is_not_waited_for_forever(tmp_path: Path) -> None:
    with serving(tmp_path, request_timeout_s=0.2) as server:
        with raw(server, {**server.key("generate"), "Content-Length": "10"}, b"{") as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        eventually(lambda: len(server.concurrency) == 0)


def test_strangers_are_refused_before_they_send_a_body(server: Server) -> None:
    headers = {"Content-Length": "1000000", "Expect": "100-continue"}
    with raw(server, headers, b"") as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")


# Limits


def test_a_rate_that_is_reached_gives_429_with_the_seconds_to_wait(plain: Server) -> None:
    headers = plain.key("generate", requests_per_minute=3)
    answers = [plain.client.post(DRAW, headers=headers, json={}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert error_of(answers[3])["code"] == "rate_limit_exceeded"
    assert int(answers[3].headers["retry-after"]) in range(1, 21)
    others = [plain.client.get("/v1/models", headers=headers).status_code for _ in range(5)]
    assert others == [200] * 5, "only drawing is limited"


def test_requests_at_the_same_time_are_limited_and_a_refused_one_costs_no_token(plain: Server) -> None:
    headers = plain.key("generate", concurrent_requests=2, requests_per_minute=3)

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=plain.client.base_url, headers=headers) as client:
            return await asyncio.gather(*(client.post(DRAW, json={"wait": 0.5}) for _ in range(6)))

    answers = asyncio.run(ask())
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert error_of(refused)["code"] == "concurrency_limit_exceeded"
    assert refused.headers["retry-after"] == "1"
    assert plain.client.post(DRAW, headers=headers, json={}).status_code == 200, "the third token is there"


def test_a_thousand_keys_at_once_each_have_their_own_limits(plain: Server) -> None:
    tree = json.loads(plain.path.read_text())
    # Written at once: making a thousand keys one by one would write the file a thousand times.
    tokens = [f"diffray-{number:08x}-{number:064x}" for number in range(1000)]
    own = {"concurrent_requests": 1, "requests_per_minute": 2}
    made = [
        {**tree["keys"][0], **own, "id": token.split("-")[1], "sha256": digest(token)} for token in tokens
    ]
    plain.path.write_text(json.dumps({"keys": made}))

    everybody = threading.Barrier(20)

    async def ask(tokens: list[str]) -> tuple[list[str], list[int]]:
        async with httpx.AsyncClient(base_url=plain.client.base_url, timeout=120, verify=False) as client:

            async def draw(token: str, **told: Any) -> httpx.Response:
                return await client.post(DRAW, headers={"Authorization": f"Bearer {token}"}, json=told)

            held = [asyncio.ensure_future(draw(token, **{"until opened": True})) for token in tokens]
            while len(plain.concurrency) < 1000:
                assert not any(answer.done() for answer in held), "one was not held"
                await asyncio.sleep(0.1)
            beside = [error_of(await draw(token))["code"] for token in tokens]
            await asyncio.to_thread(everybody.wait)
            plain.open()
            return beside, [(await answer).status_code for answer in held]

    # Several clients, since httpx looks through all connections of one for each request.
    with ThreadPoolExecutor(20) as pool:
        for beside, held in pool.map(lambda first: asyncio.run(ask(tokens[first::20])), range(20)):
            assert beside == ["concurrency_limit_exceeded"] * 50 and held == [200] * 50
    assert len(plain.concurrency) == 0 and sample(plain, "diffray_open_requests") == 0


# Answers, and clients that leave


def test_parts_of_an_answer_arrive_while_the_others_are_made(server: Server) -> None:
    headers = server.key("generate")
    with server.client.stream("POST", DRAW, headers=headers, json={"stream": 5}) as answer:
        arrivals = [(time.monotonic(), text) for text in answer.iter_text()]
    assert "".join(text for _, text in arrivals) == "".join(f"data: {i}\n\n" for i in range(5))
    assert arrivals[-1][0] - arrivals[0][0] > 0.1
    assert answer.headers["x-request-id"]
    eventually(lambda: len(server.concurrency) == 0)


def test_a_stream_holds_its_slot_to_the_end(server: Server) -> None:
    headers = server.key("generate", concurrent_requests=1)
    told = {"stream": 3, "until opened": True}
    with server.client.stream("POST", DRAW, headers=headers, json=told) as answer:
        parts = answer.iter_text()
        next(parts)
        assert server.client.post(DRAW, headers=headers, json={}).status_code == 429
        server.open()
        assert "".join(parts) == "data: 1\n\ndata: 2\n\n"
    eventually(lambda: len(server.concurrency) == 0)
    assert server.client.post(DRAW, headers=headers, json={}).status_code == 200


@pytest.mark.parametrize("told", [{"wait": 60}, {"stream": 1000}])
def test_a_client_that_leaves_frees_its_slot_and_ends_its_work(server: Server, told: dict[str, Any]) -> None:
    headers = server.key("generate", concurrent_requests=1)
    body = json.dumps(told).encode()
    with raw(server, {**headers, "Content-Length": str(len(body))}, body):
        eventually(lambda: server.events)
        assert len(server.concurrency) == 1
    eventually(lambda: len(server.concurrency) == 0)
    eventually(lambda: re.match("cancelled|streamed", server.events[-1]))
    assert sample(server, "diffray_open_requests") == 0
    assert [line["status"] for line in server.lines() if line["message"] == "request"] == [499]
    assert server.client.post(DRAW, headers=headers, json={}).status_code == 200


def test_a_client_that_leaves_before_its_body_is_complete_frees_its_slot(server: Server) -> None:
    with raw(server, {**server.key("generate"), "Content-Length": "10"}, b"{"):
        eventually(lambda: len(server.concurrency) == 1)
    eventually(lambda: len(server.concurrency) == 0)
    assert not server.events


def test_work_after_the_answer_is_finished_though_the_client_leaves_and_holds_no_slot(server: Server) -> None:
    headers = {**server.key("generate"), "Connection": "close"}
    httpx.post(server.client.base_url.join(DRAW), headers=headers, json={"later": 0.3})
    assert len(server.concurrency) == 0 and "done later" not in server.events
    eventually(lambda: "done later" in server.events)


def test_a_failure_is_answered_in_openais_shape_without_its_details(plain: Server) -> None:
    headers = {**plain.key("generate"), "X-Request-ID": "failing"}
    answer = plain.client.post(DRAW, headers=headers, json={"fail": "badly"})
    assert answer.status_code == 500 and "secret" not in answer.text
    assert error_of(answer)["type"] == "server_error" and answer.headers["x-request-id"] == "failing"
    for body in ({"fail": "drawing"}, {"late": "drawing"}):
        answer = plain.client.post(DRAW, headers=headers, json=body)
        assert "drawing_failed" in answer.text and "request id failing" in answer.text
        assert "secret" not in answer.text
    failures = [line for line in plain.lines() if line["level"] == "error"]
    assert len(failures) == 3
    for each in failures:
        assert each["request_id"] == "failing" and "a secret of the server" in each["exception"]


def test_a_stream_that_breaks_is_not_taken_for_a_whole_answer(server: Server) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        server.client.post(DRAW, headers=server.key("generate"), json={"stream": 9, "break": True})
    eventually(lambda: len(server.concurrency) == 0)
    assert [line["status"] for line in server.lines() if line["message"] == "request"] == [500]


def test_an_error_within_a_stream_is_its_last_event_and_counts_with_its_own_status(plain: Server) -> None:
    plain.metrics.serve([("diffray", 3)])
    answer = plain.client.post(DRAW, headers=plain.key("generate"), json={"late": True})
    assert answer.status_code == 200 and answer.text.splitlines()[-3] == "event: error"
    assert '"code": "timeout"' in answer.text
    eventually(lambda: sample(plain, "diffray_rejected_requests_total", reason="timeout") == 1)
    counted = {"model": "diffray", "version": "3", "status": "504"}
    assert sample(plain, "diffray_request_seconds_count", **counted) == 1
    assert [line["status"] for line in plain.lines() if line["message"] == "request"] == [504]


def test_an_error_comes_out_of_a_replica_with_its_headers() -> None:
    error = APIError(429, "later", None, "rate_limit_exceeded", {"retry-after": "3"})
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.body(), copy.status, copy.headers) == (error.body(), 429, {"retry-after": "3"})
    assert pickle.loads(pickle.dumps(APIError(400, "no"))).headers == {}


# What is counted and logged


def test_requests_are_counted_by_model_version_and_status_as_far_as_they_are_known(plain: Server) -> None:
    plain.metrics.serve([("diffray", 3)])
    headers = plain.key("generate")
    plain.client.post(DRAW, headers=headers, json={})
    plain.client.post(DRAW, headers=headers, json={"fail": "full"})
    plain.client.post(DRAW, json={})
    count = "diffray_request_seconds_count"
    assert sample(plain, count, model="diffray", version="3", status="200") == 1
    assert sample(plain, count, model="diffray", version="3", status="503") == 1
    assert sample(plain, count, model="other", version="other", status="401") == 1
    assert sample(plain, "diffray_rejected_requests_total", reason="queue_full") == 1
    assert sample(plain, "diffray_answers_total", alias="champion", status="200") == 1


def test_a_request_is_one_line_of_json_with_its_ids_and_without_its_prompt(plain: Server) -> None:
    headers = {**plain.key("generate"), "X-Request-ID": "r-1"}
    plain.client.post(DRAW + "?token=secret", headers=headers, json={"prompt": "a private thing"})
    plain.client.get("/healthz")
    (line,) = plain.lines()[-1:]
    key_id = headers["Authorization"].split("-")[1]
    expected = {"request_id": "r-1", "key_id": key_id, "method": "POST", "path": DRAW, "status": 200}
    assert line | expected == line and line["model"] == "diffray" and 0 < line["seconds"] < 5
    text = plain.log.getvalue()
    assert "private" not in text and "secret" not in text
    assert headers["Authorization"].rpartition("-")[2] not in text


def test_a_prompt_is_logged_when_told_so(tmp_path: Path) -> None:
    with serving(tmp_path, log_prompts=True) as server:
        prompt = 'a\n{"status": 200}\r\x1b[2J\u2028\u202e"'
        server.client.post(DRAW, headers=server.key("generate"), json={"prompt": prompt})
        assert server.lines()[-1]["prompt"] == prompt
        assert server.log.getvalue().count("\n") == len(server.lines()) and server.log.getvalue().isascii()


def test_a_path_cannot_forge_a_line(plain: Server) -> None:
    plain.client.get("/web/%0A%7B%22status%22%3A200%7D%E2%80%A8" + "x" * 5000)
    (line,) = plain.lines()
    assert line["path"].startswith('/web/\n{"status":200}\u2028xxx') and len(line["path"]) == 2000


def test_a_study_needs_the_right_to_vote() -> None:
    assert needed_scope("/v1/feedback/studies/spring") == "feedback"
    assert needed_scope("/v1/feedback/studies/spring/images/img-0") == "feedback"
