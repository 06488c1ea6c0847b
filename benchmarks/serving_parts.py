"""The parts of `benchmarks.serving`. Each takes the running servers and gives its figures.

A request's latency is from its arrival to the end of its answer. Throughput is of what was answered within a
window; what of it was begun before the window is as much as what is unfinished after it. The first
`WARM_UP` of a window does not count.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.data.measuring import in_fresh_process
from benchmarks.serving_alone import bare_denoiser, lone_requests
from benchmarks.serving_load import MEAN_ROW_STEPS, MEAN_STEPS, Answer, Plan, body_of, load, lone
from benchmarks.serving_servers import BATCHED, OURS, RIVALS, Servers
from benchmarks.serving_soak import Memory, growth
from ray_jobs.console import say

WARM_UP = 1 / 3  # of a window: requests of full batches take many seconds
SHARES = (0.5, 0.8)  # of a server's own capacity
LATENCY_WINDOWS = 3  # times as long as those of throughput
ERRORS_KEPT = 3  # of a window's different ones
BATCH_SIZES = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32]  # of the bare denoiser


@dataclass(frozen=True)
class Settings:
    """Of a run; stored with its figures.

    Attributes:
        model: folder in diffusers' format.
        seconds: of a window of throughput.
        rounds: in which the servers take turns.
        clients: of a closed loop.
        max_batch_size: pictures, of ours.
        rival_batch_size: pictures, of `batched`.
        num_adapters: in the mix.
        num_lone: requests whose overhead is measured, of each number of pictures.
        soak_minutes: of the soak.
    """

    model: str
    seconds: float
    rounds: int
    clients: int
    max_batch_size: int
    rival_batch_size: int
    num_adapters: int
    num_lone: int
    soak_minutes: float


@dataclass
class Run:
    """One run: what was measured in it stays comparable.

    Attributes:
        bare: picture steps a second of the bare denoiser by batch size, before any server was started.
        capacities: requests a second of the servers at saturation, as far as they are known.
    """

    settings: Settings
    servers: Servers
    bare: dict[int, float] = field(default_factory=dict)
    capacities: dict[str, float] = field(default_factory=dict)

    def saturate(self, server: str, seed: int, models: Sequence[str] | None = None) -> dict[str, Any]:
        """Throughput with always as many requests open as there are clients."""
        wanted = self.servers.models(server) if models is None else models
        settings = self.settings
        plan = Plan(
            self.servers.urls[server], settings.seconds, seed, clients=settings.clients, models=wanted
        )
        found = throughput(load(plan), plan.seconds)
        if not found["images"]:
            raise ValueError(f"--seconds: {server} drew nothing in {plan.seconds:g}: {found['examples']}")
        say("bench", f"{server}: {found['images_per_second']:.2f} images a second, {found['errors']} errors")
        return found

    def arrive(self, server: str, rate: float, seconds: float) -> dict[str, Any]:
        """Latencies with requests that arrive by themselves, the same ones at every rate and server."""
        plan = Plan(self.servers.urls[server], seconds, seed=0, rate=rate, models=self.servers.models(server))
        found = {"requests_per_second": rate} | latencies(load(plan), seconds)
        told = ", ".join(f"{name} {found[f'{name}_s']:.2f} s" for name in ("p50", "p95"))
        say("bench", f"{server} at {rate:.2f} requests a second: {told}, {found['errors']} errors")
        return found

    def capacity(self, server: str) -> float:
        """Requests a second of the mixture's mean size that a server answers at saturation."""
        if server not in self.capacities:
            steps = self.saturate(server, seed=0)["row_steps_per_second"]
            self.capacities[server] = steps / MEAN_ROW_STEPS
        return self.capacities[server]


def throughput(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Of a closed loop. `images_per_second` are those of the mixture's mean step count, so that it does not
    matter which requests fell into the window."""
    begin = WARM_UP * seconds
    counted = [each for each in answers if begin <= each.answered < seconds]
    drawn = [each for each in counted if each.error is None]
    row_steps = sum(each.pictures * each.steps for each in drawn) / (seconds - begin)
    return {
        "requests": len(counted),
        **errors(counted),
        "images": sum(each.pictures for each in drawn),
        "row_steps_per_second": row_steps,
        "images_per_second": row_steps / MEAN_STEPS,
    }


def latencies(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Of an open loop: of the requests that were answered; those that failed are counted, the first too."""
    times = [each.latency for each in answers if each.asked >= WARM_UP * seconds and each.error is None]
    p50, p95 = np.percentile(times, [50, 95]).tolist() if times else (float("nan"), float("nan"))
    return {"requests": len(answers), **errors(answers), "p50_s": p50, "p95_s": p95}


def errors(answers: Sequence[Answer]) -> dict[str, Any]:
    """How many, and a few different ones."""
    found = [each.error for each in answers if each.error is not None]
    return {"errors": len(found), "examples": list(dict.fromkeys(found))[:ERRORS_KEPT]}


def saturation(run: Run) -> dict[str, Any]:
    """All servers and the bare denoiser in turns."""
    settings = run.settings
    turns: dict[str, list[dict[str, Any]]] = {server: [] for server in (*RIVALS, OURS)}
    beside: list[float] = []
    alike = same_pictures(run.servers)
    for seed in range(settings.rounds):
        speeds = in_fresh_process(bare_denoiser, settings.model, BATCH_SIZES, settings.seconds / 4)
        beside.append(max(speeds.values()))
        for server, found in turns.items():
            found.append(run.saturate(server, seed))
    steps = {
        server: median(turn["row_steps_per_second"] for turn in found) for server, found in turns.items()
    }
    run.capacities |= {server: each / MEAN_ROW_STEPS for server, each in steps.items()}
    best = max(run.bare, key=lambda size: run.bare[size])
    bare, idle = run.bare[best], median(beside)
    return {
        "mean_steps": MEAN_STEPS,
        "bare_row_steps_per_second": run.bare,
        "bare_best_batch_size": best,
        "row_steps_per_second": {"bare": bare, "bare beside idle servers": idle, **steps},
        "images_per_second": {
            name: speed / MEAN_STEPS
            for name, speed in {"bare": bare, "bare beside idle servers": idle, **steps}.items()
        },
        "largest_difference_of_pixels": alike,
        "turns": turns,
        "ratios": {
            "bare": steps[OURS] / bare,
            "bare beside idle servers": steps[OURS] / idle,
            **{server: steps[OURS] / steps[server] for server in RIVALS},
        },
    }


def same_pictures(servers: Servers) -> dict[str, int]:
    """By how many of 255 levels the rivals' pictures of one request differ from ours, at most."""
    drawn: dict[str, list[np.ndarray]] = {}
    with httpx.Client(timeout=600, trust_env=False) as client:
        for server, url in servers.urls.items():
            model = next(iter(servers.models(server)), None)
            _, pictures = lone(url, body_of("a red apple", seed=7, steps=20, pictures=2, model=model), client)
            drawn[server] = [np.asarray(Image.open(io.BytesIO(png)), np.int16) for png in pictures]
    return {
        rival: max(
            int(np.abs(one - other).max()) for one, other in zip(drawn[OURS], drawn[rival], strict=True)
        )
        for rival in RIVALS
    }


def latency(run: Run) -> dict[str, Any]:
    """Each server at shares of its own capacity, and ours at the load that is the highest of `batched`."""
    seconds = LATENCY_WINDOWS * run.settings.seconds
    own: dict[str, dict[str, Any]] = {}
    for server in (*RIVALS, OURS):
        capacity = run.capacity(server)
        own[server] = {str(share): run.arrive(server, share * capacity, seconds) for share in SHARES}
    theirs = own[BATCHED][str(SHARES[-1])]
    equal = run.arrive(OURS, theirs["requests_per_second"], seconds)
    return {
        "capacities": dict(run.capacities),
        "own_load": own,
        "equal_load": {OURS: equal, BATCHED: theirs},
        "ratios": {name: equal[f"{name}_s"] / theirs[f"{name}_s"] for name in ("p50", "p95")},
    }


def alone(run: Run) -> dict[str, Any]:
    """Ours, and the bare denoiser while no server was up."""
    turns = [run.saturate(OURS, seed) for seed in range(run.settings.rounds)]
    steps = median(turn["row_steps_per_second"] for turn in turns)
    run.capacities[OURS] = steps / MEAN_ROW_STEPS
    bare = max(run.bare.values())
    return {
        "bare_row_steps_per_second": run.bare,
        "row_steps_per_second": {"bare": bare, OURS: steps},
        "images_per_second": {"bare": bare / MEAN_STEPS, OURS: steps / MEAN_STEPS},
        "turns": turns,
        "ratios": {"bare": steps / bare},
    }


def adapters(run: Run) -> dict[str, Any]:
    """All adapters mixed against one, and none, in turns. All are in memory, as long as they have room."""
    mixes = {"none": run.servers.models(OURS), "one": run.servers.adapters[:1], "all": run.servers.adapters}
    url = run.servers.urls[OURS]
    with httpx.Client(timeout=600, trust_env=False) as client:
        for model in run.servers.adapters:
            lone(url, body_of("a cat", seed=0, steps=10, model=model), client)
    turns: dict[str, list[dict[str, Any]]] = {mix: [] for mix in mixes}
    for seed in range(run.settings.rounds):
        for mix, models in mixes.items():
            turns[mix].append(run.saturate(OURS, seed, models))
    speeds = {mix: median(turn["images_per_second"] for turn in found) for mix, found in turns.items()}
    return {
        "adapters": len(run.servers.adapters),
        "images_per_second": speeds,
        "turns": turns,
        "ratios": {
            "all to one": speeds["all"] / speeds["one"],
            "one to none": speeds["one"] / speeds["none"],
        },
    }


def overhead(run: Run) -> dict[str, Any]:
    """What a request to an idle server costs beside the networks, by its number of pictures."""
    arguments = (run.servers.urls[OURS], run.settings.model)
    found = {
        pictures: in_fresh_process(lone_requests, *arguments, pictures, run.settings.num_lone)
        for pictures in (1, 4)
    }
    return {"turns": run.settings.num_lone, "pictures": found}


def soak(run: Run) -> dict[str, Any]:
    """Errors, and the memory of the replica and of the HTTP process, at the highest of SHARES."""
    seconds, rate = 60 * run.settings.soak_minutes, SHARES[-1] * run.capacity(OURS)
    with Memory(run.servers.urls[OURS], seconds) as memory:
        found = run.arrive(OURS, rate, seconds)
    samples = {"replica": memory.replica, "http": memory.http}
    return {
        "minutes": run.settings.soak_minutes,
        **found,
        "memory": {process: growth(memory.times, mib, seconds) for process, mib in samples.items()},
        "samples": {"seconds": memory.times, "replica_mib": memory.replica, "http_mib": memory.http},
    }


Parts = dict[str, Callable[[Run], dict[str, Any]]]
AGAINST_RIVALS: Parts = {part.__name__: part for part in (saturation, latency)}
ALONE: Parts = {part.__name__: part for part in (alone, adapters, overhead, soak)}


def measure_bare(settings: Settings) -> dict[int, float]:
    """The bare denoiser while no server is up."""
    return in_fresh_process(bare_denoiser, settings.model, BATCH_SIZES, settings.seconds)
