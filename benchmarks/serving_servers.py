"""The servers of `benchmarks.serving`: ours and its rivals, all up at once, on one machine and one model.

Ours and `batched` are applications of one Ray Serve behind one HTTP proxy, on an embedded Ray of their own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.adapters import write_adapters
from benchmarks.data.pictures import configured
from benchmarks.serving_load import ROOT, wait_until_answers
from cluster.connect import joined
from cluster.local import KEEP_MEMORY, local_cluster
from ray_jobs.config import Config
from ray_jobs.registry.models import champion
from ray_jobs.registry.promotion import Measured
from ray_jobs.registry.registration import register
from serving.app import APPLICATION
from serving.command import endpoint, free_port
from serving.messages import BASE, ReplicaLoad

OURS, BATCHED, SEQUENTIAL = "diffray", "batched", "sequential"
RIVALS = (SEQUENTIAL, BATCHED)
NAME = "bench"  # of the registered model
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Servers:
    """What is up.

    Attributes:
        urls: by server.
        adapters: what a request to ours may give as its `model` to be drawn with one LoRA version.
    """

    urls: dict[str, str]
    adapters: tuple[str, ...]

    def models(self, server: str) -> tuple[str, ...]:
        """What makes a server draw with the very weights that the others have."""
        return (BASE,) if server == OURS else ()


@contextmanager
def running(
    model: str, folder: Path, *, max_batch_size: int, rival_batch_size: int | None, num_adapters: int
) -> Iterator[Servers]:
    """The servers, for the block's time, each after its first picture.

    Args:
        model: folder in diffusers' format, absolute.
        folder: empty; for the registry and the weights in it.
        max_batch_size: pictures, of ours.
        rival_batch_size: pictures, of `batched`; None: no rivals.
        num_adapters: LoRA versions in the registry, at least one.
    """
    os.environ.update(KEEP_MEMORY)  # as the embedded Ray's processes have it, so that all have the same
    config = served(model, folder, max_batch_size)
    adapters = publish(config, folder / "adapters", num_adapters)
    with (
        local_cluster(config.local) as cluster,
        joined(cluster.gcs_address),
        endpoint(config, champion(config), free_port(HOST, 0)) as url,
    ):
        if rival_batch_size is None:
            yield Servers({OURS: url}, adapters)
            return
        with sequential_server(model) as sequential_url:
            batched_url = start_batched(url, model, rival_batch_size)
            yield Servers({OURS: url, SEQUENTIAL: sequential_url, BATCHED: batched_url}, adapters)


def served(model: str, folder: Path, max_batch_size: int) -> Config:
    """The demo's configuration, without limits of a client, for one machine's load is one client."""
    settings: dict[str, Any] = {
        "model.base": model,
        "publish.model_name": NAME,
        "serve.host": HOST,
        "serve.max_batch_size": max_batch_size,
        "serve.max_queued_requests": 512,
        "serve.requests_per_minute": 1_000_000,
        "serve.concurrent_requests": 10_000,
        "serve.request_timeout_s": 600,
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    return configured(ROOT / "examples" / "fluent-emoji", folder / "runs", *overrides)


def publish(config: Config, folder: Path, count: int) -> tuple[str, ...]:
    """Register so many LoRA versions with random weights; their names for requests. The first is champion."""
    folder.mkdir()
    measured = Measured(1.0, None, num_samples=1, feature_network="none", data="none")
    return tuple(
        f"{NAME}@{register(config, source=str(folder / name), measured=measured, params={}).version}"
        for name in write_adapters(folder, count, config.model.base)
    )


@contextmanager
def sequential_server(model: str) -> Iterator[str]:
    """The rival in a process of its own; yields its URL."""
    port = free_port(HOST, 0)
    command = [sys.executable, "-m", "benchmarks.serving_rivals", "--model", model, "--port", str(port)]
    url = f"http://{HOST}:{port}"
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        try:
            wait_until_answers(url)
            yield url
        finally:
            process.stdin.close()


def start_batched(url: str, model: str, max_batch_size: int) -> str:
    """The rival beside our application, with whose Serve it goes; its URL.

    Args:
        url: of our application.
    """
    from ray import serve

    from benchmarks.serving_rivals import batched

    serve.run(batched(model, max_batch_size), name=BATCHED, route_prefix=f"/{BATCHED}")
    wait_until_answers(f"{url}/{BATCHED}")
    return f"{url}/{BATCHED}"


def replica() -> ReplicaLoad:
    """What our only replica is doing."""
    from ray import serve

    handle = serve.get_deployment_handle("Model", APPLICATION)
    (load,) = handle.broadcast("load").results(timeout_s=60)
    assert isinstance(load, ReplicaLoad)
    return load
