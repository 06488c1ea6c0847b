"""The load of `benchmarks.serving`: requests of the Images API from a process of their own.

    python -m benchmarks.serving_load < plan.json > answers.json

It imports no PyTorch and no Ray, so that what it takes of the cores is little, and the same for every server.
"""

import asyncio
import base64
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any, NamedTuple

import httpx

ROOT = Path(__file__).parents[1]
CAPTIONS = ROOT / "examples" / "fluent-emoji" / "metadata.jsonl"
STEPS = (10, 50)  # denoising steps, uniform, both included
PICTURES = (1, 4)  # of a request, as above
GUIDANCE_SCALE = 3.0
MEAN_STEPS = sum(STEPS) / 2
MEAN_ROW_STEPS = MEAN_STEPS * sum(PICTURES) / 2  # of a request: its pictures' steps
PATH = "/v1/images/generations"
PNG = base64.b64encode(b"\x89PNG\r\n")[:8].decode()  # how a PNG begins
TIMEOUT_S = 600.0  # for one answer; a server that is slower is counted as an error


@dataclass(frozen=True)
class Plan:
    """What one window of load is; exactly one of `clients` and `rate` is given.

    Attributes:
        url: of the server, without the path.
        seconds: for which requests are begun.
        seed: of the requests and their arrivals: the same seed, the same requests in the same order.
        clients: closed loop: each asks again as soon as it has its answer.
        rate: open loop: requests a second, arriving as a Poisson process, whatever the server does.
        models: what the requests give as their `model`, in turn; none: nothing.
    """

    url: str
    seconds: float
    seed: int = 0
    clients: int | None = None
    rate: float | None = None
    models: Sequence[str] = ()


class Answer(NamedTuple):
    """Of one request. Times are seconds since the window began."""

    asked: float  # when it arrived, which in an open loop may be before it could be sent
    answered: float
    pictures: int
    steps: int
    error: str | None  # None: all its pictures came

    @property
    def latency(self) -> float:
        """Seconds."""
        return self.answered - self.asked


def body_of(
    prompt: str, *, seed: int, steps: int, pictures: int = 1, model: str | None = None
) -> dict[str, Any]:
    """Of POST /v1/images/generations."""
    body = {
        "prompt": prompt,
        "n": pictures,
        "steps": steps,
        "seed": seed,
        "guidance_scale": GUIDANCE_SCALE,
    }
    return body | ({"model": model} if model else {})


def requests_of(seed: int, models: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Bodies without end, whose prompts hardly ever come twice."""
    captions = [json.loads(line)["text"] for line in CAPTIONS.read_text(encoding="utf-8").splitlines()]
    draw, named = random.Random(seed), cycle(models or [None])
    while True:
        yield body_of(
            f"{draw.choice(captions)}, number {draw.randrange(1000)}",
            seed=draw.randrange(2**31 - 8),
            steps=draw.randint(*STEPS),
            pictures=draw.randint(*PICTURES),
            model=next(named),
        )


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Seconds at which requests of a Poisson process arrive; those of another rate are these, stretched."""
    draw, now = random.Random(f"arrivals {seed}"), 0.0
    while (now := now + draw.expovariate(1.0) / rate) < seconds:
        yield now


class Window:
    """Requests to one server, and their answers."""

    def __init__(self, plan: Plan, client: httpx.AsyncClient) -> None:
        self.plan, self.client = plan, client
        self.requests = requests_of(plan.seed, plan.models)
        self.answers: list[Answer] = []
        self.began = time.perf_counter()

    @property
    def now(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.began

    async def ask(self, body: dict[str, Any], asked: float) -> None:
        """One request to the end of its answer."""
        try:
            answer = await self.client.post(self.plan.url + PATH, json=body)
            error = None if answer.status_code == 200 else f"{answer.status_code}: {answer.text[:200]}"
            if error is None:
                data = answer.json()["data"]
                if len(data) != body["n"] or not all(each["b64_json"].startswith(PNG) for each in data):
                    error = "not the pictures that were asked for"
        except (httpx.HTTPError, ValueError, KeyError) as failure:
            error = repr(failure)[:200]
        self.answers.append(Answer(asked, self.now, body["n"], body["steps"], error))

    async def closed(self, clients: int) -> None:
        """So many clients until the time is over."""

        async def client() -> None:
            while self.now < self.plan.seconds:
                await self.ask(next(self.requests), self.now)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def open(self, rate: float) -> None:
        """Requests as they arrive; returns when the last one is answered."""
        async with asyncio.TaskGroup() as tasks:
            for arrival in arrivals(rate, self.plan.seconds, self.plan.seed):
                await asyncio.sleep(max(0.0, arrival - self.now))
                tasks.create_task(self.ask(next(self.requests), arrival))


async def apply(plan: Plan) -> list[Answer]:
    """Load a server as planned; all answers, those after the window's end too."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # Straight to the server: a proxy of the environment would not reach this machine.
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
        window = Window(plan, client)
        if plan.rate is not None:
            await window.open(plan.rate)
        else:
            assert plan.clients is not None
            await window.closed(plan.clients)
    return window.answers


def load(plan: Plan) -> list[Answer]:
    """`apply` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(asdict(plan)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return [Answer(*each) for each in json.loads(done.stdout)]


def lone(url: str, body: dict[str, Any], client: httpx.Client) -> tuple[float, list[bytes]]:
    """One request: seconds to the end of its answer, and its pictures as PNG files."""
    began = time.perf_counter()
    answer = client.post(url + PATH, json=body)
    answer.raise_for_status()
    pictures = [each["b64_json"] for each in answer.json()["data"]]
    seconds = time.perf_counter() - began
    return seconds, [base64.b64decode(each) for each in pictures]


def wait_until_answers(url: str, timeout_s: float = 120) -> None:
    """Return once a server draws.

    Raises:
        TimeoutError: nothing listens there within `timeout_s` seconds.
        httpx.HTTPStatusError: it answers with an error.
    """
    deadline = time.monotonic() + timeout_s
    with httpx.Client(timeout=timeout_s, trust_env=False) as client:
        for _ in count():
            try:
                lone(url, body_of("a cat", seed=0, steps=STEPS[0]), client)
                return
            except httpx.TransportError as error:  # nothing listens yet
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{url}: {error!r}") from error
                time.sleep(0.5)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(apply(Plan(**json.load(sys.stdin))))))
