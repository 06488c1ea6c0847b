"""Join the Ray cluster that this process belongs to, or start an embedded one on this machine."""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cluster.local import QUIET, local_cluster
from cluster.nodes import Node, check_storage, described, living_nodes
from cluster.preflight import check_gpus
from cluster.watch import require_room
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import say

ANSWER_S = 10
"""Timeout for connecting to the head of a cluster, in seconds."""


@contextmanager
def connect(config: Config, stage: str = "search") -> Iterator[Sequence[Node]]:
    """Join the cluster of this Ray job (RAY_ADDRESS), else start an embedded one; yield the cluster's nodes.

    A cluster that this process has already joined is used, and left running.

    Args:
        stage: the command for which the cluster must have room (`cluster.capacity.STARTS`).

    Raises:
        ConfigError: the cluster rejects this process, is too small for the stage, or its nodes do not share
            the storage; raised before any actor starts.
    """
    import ray

    if ray.is_initialized():
        yield _look_around(config, stage)
    elif os.environ.get("RAY_ADDRESS"):
        with joined(os.environ["RAY_ADDRESS"]):
            yield _look_around(config, stage)
    else:
        with local_cluster(config.local) as cluster, joined(cluster.gcs_address):
            yield _look_around(config, stage)


def _look_around(config: Config, stage: str) -> Sequence[Node]:
    """Print the cluster's resources; check its size, storage and GPUs; return the nodes."""
    nodes = living_nodes()
    say("cluster", described(nodes))
    require_room(config, nodes, stage)
    check_storage(config, nodes)
    check_gpus(config, nodes, stage)
    return nodes


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Join the cluster at `address` as a driver within the block; workers' output goes to Ray's logs only.

    Raises:
        ConfigError: nothing answers there, or the cluster rejects the token or the version of Ray or Python.
    """
    import ray

    os.environ.update(QUIET)
    _require_answer(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        said = one_line(error)
        if said.startswith("Version mismatch"):
            said += "; use the same Ray and Python version here and on the cluster"
        raise ConfigError(f"RAY_ADDRESS: {address}: {said}") from None
    _quiet_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise ConfigError if nothing listens at host:port; Ray itself would retry for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # `auto` and the like, which Ray resolves
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS: {address}: no answer ({error}); give the head node and its GCS port, or unset "
            "RAY_ADDRESS to start Ray on this machine"
        ) from None


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300]


def _quiet_ray_data() -> None:
    """Limit Ray Data's console output to errors; its log file in the session folder keeps everything."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for channel in logging.getLogger("ray.data").handlers:
        if type(channel).__name__ == "PlainRayHandler":
            channel.setLevel(logging.ERROR)
