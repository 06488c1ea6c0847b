"""Requests that are answered later: their states, their pictures, their end, and a restart in between."""

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from cluster.storage import Storage
from ray_jobs.config import ServeConfig
from serving.feedback.database import open_database
from serving.feedback.store import FeedbackStore
from serving.jobs import Job
from serving.schemas import APIError, ImageData, ImageRequest, ImageResponse
from serving.service.given_files import GivenFiles
from serving.service.jobs import Jobs
from serving.service.request_context import RequestContext
from serving.service.webhooks import Webhooks, is_public
from tests.serving.conftest import wait_until
from tests.serving.endpoint_here import EndpointHere, endpoint_here

LATER = {"Prefer": "respond-async"}


class Receiver:
    """An HTTP server that keeps what it is sent, and refuses the first of it."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(500 if len(receiver.got) == 1 else 204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?for=jobs"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture(scope="module")
def here(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EndpointHere]:
    folder = tmp_path_factory.mktemp("here")
    with endpoint_here(folder, tiny_model, private_webhooks=True, max_jobs=3, follow_s=3600) as endpoint:
        yield endpoint


def asked(here: EndpointHere, **body: Any) -> httpx.Response:
    return httpx.post(f"{here.url}/v1/images/generations", json={"prompt": "a", **body}, headers=LATER)


def ended(here: EndpointHere, job_id: str) -> dict[str, Any]:
    def job() -> dict[str, Any] | None:
        found: dict[str, Any] = httpx.get(f"{here.url}/v1/jobs/{job_id}").json()
        return found if found["finished_at"] else None

    return dict(wait_until(job))


def test_a_job_gives_what_a_plain_request_gives_and_its_end_is_announced_and_signed(
    here: EndpointHere, receiver: Receiver
) -> None:
    answer = asked(here, seed=5, n=2, webhook_url=receiver.url)
    assert answer.status_code == 202, answer.text
    assert answer.headers["preference-applied"] == "respond-async"
    job = answer.json()
    assert (job["status"], job["result"], answer.headers["location"]) == (
        "queued",
        None,
        f"/v1/jobs/{job['id']}",
    )
    found = ended(here, job["id"])
    assert found["status"] == "completed" and found["error"] is None
    plain = here.client.images.generate(prompt="a", n=2, extra_body={"seed": 5})
    for one, other in zip(found["result"]["data"], plain.data or [], strict=True):
        assert np.abs(pixels(one["b64_json"]) - pixels(other.b64_json or "")).max() <= 1

    wait_until(lambda: len(receiver.got) == 2, 30)  # the first attempt was refused
    (first, _), (headers, body) = receiver.got
    secret = httpx.get(f"{here.url}/v1/webhooks/secret").json()["secret"]
    here.client.webhooks.verify_signature(payload=body, headers=headers, secret=secret)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        here.client.webhooks.verify_signature(payload=body + b" ", headers=headers, secret=secret)
    assert first["webhook-id"] == headers["webhook-id"] == f"evt-{job['id']}"
    event = json.loads(body)
    assert (event["type"], event["data"]) == ("image.job.completed", {"id": job["id"]})


def pixels(picture: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).astype(int)


def test_an_edit_may_be_a_job_and_its_pictures_are_deleted_with_its_end(here: EndpointHere) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(file, "PNG")
    raw = here.client.images.with_raw_response.edit(
        image=file.getvalue(), prompt="a", response_format="url", extra_headers=LATER
    )
    assert raw.status_code == 202
    found = ended(here, json.loads(raw.content)["id"])
    assert httpx.get(found["result"]["data"][0]["url"]).status_code == 200
    jobs = Path(here.config.storage, "here", "jobs")
    assert list(jobs.rglob("result.json")) and not list(jobs.rglob("image-*"))
    broken = httpx.post(
        f"{here.url}/v1/images/edits", data={"prompt": "a"}, files={"image": b"text"}, headers=LATER
    )
    failed = ended(here, broken.json()["id"])
    assert (failed["status"], failed["result"], failed["error"]["param"]) == ("failed", None, "image")


def test_edits_with_masks_variations_and_adapters_give_the_same_as_a_job(here: EndpointHere) -> None:
    image, mask = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(image, "PNG")
    hole = np.full((64, 64, 4), 255, np.uint8)
    hole[16:48, 16:48, 3] = 0
    Image.fromarray(hole).save(mask, "PNG")
    fields: dict[str, Any] = {"prompt": "a", "seed": 7, "steps": 3, "guidance_scale": 2}
    adapters = [{"name": "served@2", "scale": 0.5}, {"name": "served@1"}]
    files = {"image": image.getvalue()}
    requests: dict[str, dict[str, Any]] = {
        "edits": {"data": fields, "files": files | {"mask": mask.getvalue()}},
        "variations": {"data": fields | {"prompt": ""}, "files": files},
        "generations": {"json": fields | {"adapters": adapters, "guidance_interval": [0.0, 0.5]}},
    }
    for path, sent in requests.items():
        address = f"{here.url}/v1/images/{path}"
        plain = httpx.post(address, **sent).raise_for_status().json()
        job = httpx.post(address, **sent, headers=LATER).raise_for_status().json()
        result = ended(here, job["id"])["result"]
        assert (result["model"], result["adapters"]) == (plain["model"], plain["adapters"])
        one, other = (pixels(each["data"][0]["b64_json"]) for each in (result, plain))
        assert np.abs(one - other).max() <= 1, path


def test_what_is_wrong_is_told_at_once_and_by_its_field(here: EndpointHere, receiver: Receiver) -> None:
    for body, param in (
        ({"n": 99}, "n"),
        ({"model": "nobody"}, "model"),
        ({"stream": True}, "stream"),
        ({"webhook_url": "ftp://example.com"}, "webhook_url"),
        ({"webhook_url": "http://user:word@127.0.0.1/"}, "webhook_url"),
    ):
        answer = asked(here, **body)
        assert (answer.status_code // 100, answer.json()["error"]["param"]) == (4, param)
    plain = httpx.post(
        f"{here.url}/v1/images/generations", json={"prompt": "a", "webhook_url": receiver.url}
    ).json()
    assert "Prefer: respond-async" in plain["error"]["message"]
    assert httpx.get(f"{here.url}/v1/jobs/job-{0:024x}").json()["error"]["code"] == "job_not_found"


def test_open_jobs_are_limited_and_can_be_cancelled(here: EndpointHere) -> None:
    jobs = [asked(here, steps=100, n=4).json()["id"] for _ in range(3)]
    refused = asked(here)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
    for each in jobs[::-1]:
        cancelled = httpx.post(f"{here.url}/v1/jobs/{each}/cancel").json()
        assert (cancelled["status"], cancelled["result"]) == ("cancelled", None)
    done = ended(here, asked(here, steps=1).json()["id"])
    assert done["status"] == "completed"
    again = httpx.post(f"{here.url}/v1/jobs/{done['id']}/cancel").json()
    assert again["status"] == "completed"


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *("::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "224.0.0.1"),
    ],
)
def test_private_addresses_get_no_webhooks(address: str) -> None:
    assert not is_public(address)
    host = f"[{address}]" if ":" in address else address
    webhooks = Webhooks(lambda: b"key", allow_private=False)
    with pytest.raises(APIError, match="webhook_url: ") as refused:
        asyncio.run(webhooks.check(f"http://{host}/"))
    assert refused.value.status == 400
    assert not asyncio.run(
        Webhooks(lambda: b"", allow_private=False, retries_s=[0]).send("http://localhost/", "e", {}, "")
    )


def test_public_addresses_get_webhooks() -> None:
    assert is_public("8.8.8.8") and is_public("2606:4700::1111") and is_public("64:ff9b::808:808")


class Process:
    """The jobs of one ingress process, whose pictures take until it is told."""

    def __init__(self, folder: Path) -> None:
        self.feedback = FeedbackStore(open_database(f"sqlite:///{folder / 'feedback.db'}"))
        self.drawn: list[ImageRequest] = []
        self.let = asyncio.Event()
        webhooks = Webhooks(lambda: b"key", allow_private=True, retries_s=[0])
        storage = Storage.open(str(folder)).child("jobs")
        self.jobs = Jobs(self.feedback.jobs, storage, self.generate, webhooks, ServeConfig(job_hours=1))

    async def generate(
        self,
        request: ImageRequest,
        context: RequestContext,
        files: GivenFiles,
        timeout_s: float,
    ) -> ImageResponse:
        self.drawn.append(request)
        await self.let.wait()
        data = [ImageData(id=f"img-{0:024x}", b64_json="", seed=request.seed or 0)]
        return ImageResponse(created=1, data=data, model="m@1", size="8x8")


def test_a_restart_draws_what_is_open_again_with_its_seed_and_announces_what_was_not(
    tmp_path: Path, receiver: Receiver
) -> None:
    context = RequestContext(key_id="key-1")

    async def until(true: Callable[[], Any]) -> None:
        while not true():
            await asyncio.sleep(0.01)

    async def first() -> tuple[list[str], list[int | None]]:
        process = Process(tmp_path)
        running = asyncio.create_task(process.jobs.run())
        request = ImageRequest(prompt="a", webhook_url=receiver.url)
        ids = [(await process.jobs.submit("generations", request, context)).id for _ in range(3)]
        await until(lambda: len(process.drawn) == 2)
        running.cancel()  # as a process that is killed: nothing is recorded
        await asyncio.wait([running])
        return ids, [each.seed for each in process.drawn]

    async def second(ids: list[str]) -> list[int | None]:
        process = Process(tmp_path)
        process.let.set()
        running = asyncio.create_task(process.jobs.run())
        await until(lambda: len(receiver.got) >= 3)
        found = [await process.jobs.get(each, context) for each in ids]
        assert [each.status for each in found] == ["completed"] * 3
        with pytest.raises(APIError, match="no such job"):
            await process.jobs.get(ids[0], RequestContext(key_id="key-2"))
        await until(lambda: not process.feedback.jobs.unfinished())
        process.jobs.delete_expired()
        assert (await process.jobs.get(ids[0], context)).status == "completed"
        running.cancel()
        return [each.seed for each in process.drawn]

    ids, seeds = asyncio.run(asyncio.wait_for(first(), 60))
    again = asyncio.run(asyncio.wait_for(second(ids), 60))
    assert set(seeds) < set(again) and len(set(again)) == len(again) == 3 and None not in again


class FailingProcess(Process):
    """Its replicas raise what says something of the server."""

    async def generate(
        self, request: ImageRequest, context: RequestContext, files: GivenFiles, timeout_s: float
    ) -> ImageResponse:
        raise APIError(500, "image generation failed: a secret of the server", code="drawing_failed")


def test_the_error_of_a_job_says_nothing_of_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> Job:
        process, context = FailingProcess(tmp_path), RequestContext()
        running = asyncio.create_task(process.jobs.run())
        job = await process.jobs.submit("generations", ImageRequest(prompt="a"), context)
        while not (job := await process.jobs.get(job.id, context)).finished_at:
            await asyncio.sleep(0.01)
        running.cancel()
        return job

    job = asyncio.run(asyncio.wait_for(work(), 60))
    assert job.status == "failed" and job.error and job.error.code == "drawing_failed"
    assert job.id in job.error.message and "secret" not in job.error.message
    assert "a secret of the server" in caplog.text


def test_jobs_are_deleted_once_they_are_no_longer_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        process, context = Process(tmp_path), RequestContext()
        process.let.set()
        running = asyncio.create_task(process.jobs.run())
        job = await process.jobs.submit("generations", ImageRequest(prompt="a"), context)
        while not (await process.jobs.get(job.id, context)).finished_at:
            await asyncio.sleep(0.01)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 3700)
        process.jobs.delete_expired()
        with pytest.raises(APIError, match="no such job, or no longer"):
            await process.jobs.get(job.id, context)
        assert not list(Path(tmp_path, "jobs").iterdir())
        running.cancel()

    asyncio.run(asyncio.wait_for(work(), 60))
