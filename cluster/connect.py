"""Join the Ray cluster that this process belongs to, or start an embedded one on this machine."""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cluster.local import QUIET, local_cluster
from cluster.nodes import Node, check_storage, described, living_nodes
from cluster.watch import autoscaler_runs, check_fit
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import say

ANSWER_S = 10
"""How long the head of a cluster may take to accept a connection, in seconds."""


@contextmanager
def connect(config: Config) -> Iterator[Sequence[Node]]:
    """Join the cluster of this Ray job (RAY_ADDRESS); outside of a job, start an embedded one. Its nodes.

    Where this process has joined one already, that one is used and left up.

    Raises:
        ConfigError: if the cluster does not let this process in, is too small for `config`, or its nodes do
            not share the storage; before any actor starts.
    """
    import ray

    if ray.is_initialized():
        yield _look_around(config)
    elif os.environ.get("RAY_ADDRESS"):
        with joined(os.environ["RAY_ADDRESS"]):
            yield _look_around(config)
    else:
        with local_cluster(config.local) as cluster, joined(cluster.gcs_address):
            yield _look_around(config)


def _look_around(config: Config) -> Sequence[Node]:
    """Say what the cluster has, and check that the run fits and its storage is shared; its nodes."""
    nodes = living_nodes()
    say("cluster", described(nodes))
    try:
        check_fit(config, nodes)
    except ConfigError as error:
        # An autoscaler of version 2, as on Kubernetes, may bring what is lacking.
        if not autoscaler_runs():
            raise
        say("cluster", f"waiting for its autoscaler, since now {error}")
    check_storage(config, nodes)
    return nodes


@contextmanager
def joined(address: str) -> Iterator[None]:
    """This process as a driver of the cluster at `address`, its workers' output left to Ray's logs.

    Raises:
        ConfigError: nothing answers there, or it refuses the token or the version of Ray or Python.
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
            said += ": give this process and the cluster the same Ray and the same Python"
        raise ConfigError(f"RAY_ADDRESS: {address}: {said}") from None
    _quiet_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise ConfigError if nothing listens at host:port; Ray itself would ask for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # `auto` and the like, which Ray looks up
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS: {address}: nothing answers there ({error}); name the head node and its GCS port, "
            "or unset it for a Ray on this machine"
        ) from None


def one_line(error: BaseException) -> str:
    """An error's message, for a line of ours."""
    return " ".join(str(error).split())[:300]


def _quiet_ray_data() -> None:
    """Ray Data's console shows errors only; its file in the session's logs keeps everything."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for channel in logging.getLogger("ray.data").handlers:
        if type(channel).__name__ == "PlainRayHandler":
            channel.setLevel(logging.ERROR)
