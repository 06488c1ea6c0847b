"""Join the Ray cluster that this process belongs to, or start an embedded one on this machine."""

import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.capacity import sized
from cluster.nodes import Node, check_storage, described, living_nodes
from cluster.watch import autoscaler_runs, check_fit
from ray_jobs.config import Config, ConfigError, LocalConfig, home
from ray_jobs.progress import say

ANSWER_S = 10
"""How long the head of a cluster may take to accept a connection, in seconds."""

START_TIMEOUT_S = 180
"""How long the embedded Ray may take to come up, in seconds: a loaded machine of 2 cores needs 40."""

QUIET = {"RAY_DATA_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Environment of drivers and workers: no progress bars of Ray's own, no warning for every fork."""

KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""Environment of the embedded Ray's processes. glibc would return the memory of each large tensor to the
system and get it back page by page for the next one: a quarter of an encoder's time, on two cores."""

ONE_MACHINE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Environment of the embedded Ray's processes. Nobody takes its only machine away, so each training saves the
process that would watch for that."""


@dataclass(frozen=True)
class LocalCluster:
    """The embedded Ray.

    Attributes:
        address: of the Jobs API (and dashboard), on the loopback interface.
        gcs_address: what `ray.init(address=...)` takes.
        logs: the folder of the framework's logs.
    """

    address: str
    gcs_address: str
    logs: Path


@contextmanager
def local_cluster(local: LocalConfig) -> Iterator[LocalCluster]:
    """Start Ray on this machine, on loopback addresses only, guarded by a token; stop it at the end.

    All its ports are free ones and its files lie in a folder of their own, so another Ray on this
    machine, a taken port, what a killed run left behind, or RAY_ADDRESS do not matter. Ray is held by a
    process beside this one (`cluster/embedded.py`) that stops it when this process ends or is killed.

    Raises:
        RuntimeError: if Ray does not come up; it names the log.
    """
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(QUIET | KEEP_MEMORY | ONE_MACHINE)
    _require_token()
    _stay_on_loopback()
    folder = Path(tempfile.mkdtemp(prefix="diffray-"))
    local, log, port = sized(local), folder / "start.log", _free_port()
    # For Ray Train, whose processes else ask the Ray that was started last on this machine whether a training
    # is still wanted, and end it if that one does not know it.
    address = {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    settings = {
        "num_cpus": local.num_cpus,
        "object_store_memory": local.object_store_mb * 2**20,
        "temp_dir": str(folder / "ray"),
        "gcs_server_port": port,
        "node_ip_address": "127.0.0.1",
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": _free_port(),
        "dashboard_agent_listen_port": 0,
    }
    with open(log, "wb") as errors:
        holder = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("embedded.py")), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # Ray Train's workers run in folders of their own: relative paths start where this process is.
            env=os.environ | address | {"RAY_TMPDIR": str(folder), "DIFFRAY_HOME": str(home())},
            text=True,
        )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        found = holder.stdout.readline().split()
        if len(found) != 3:
            raise RuntimeError(f"the embedded Ray did not start; its log is {log}")
        cluster = LocalCluster(f"http://{found[1]}", found[0], Path(found[2]))
        _wait_until_up(cluster, log)
        yield cluster
    finally:
        holder.stdin.close()
        holder.wait()
        shutil.rmtree(folder / "ray" / "session_latest" / "runtime_resources", ignore_errors=True)


def _wait_until_up(cluster: LocalCluster, log: Path) -> None:
    """Wait until the Jobs API answers."""
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            JobSubmissionClient(cluster.address).list_jobs()
            return
        except (ConnectionError, RuntimeError):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the embedded Ray does not answer; its log is {log}") from None
            time.sleep(0.5)


def _free_port() -> int:
    """A port that nothing listens on at the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def _require_token() -> None:
    """Turn token authentication on for this process and its children, with a new token if there is none."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray reads its settings when it is imported; where that has happened, it must read them again.
    from ray import _raylet

    _raylet.Config.initialize("")  # type: ignore[attr-defined]
    _raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]


def _stay_on_loopback() -> None:
    """Have Ray take 127.0.0.1 for this machine's address; else it puts an outside one in its place.

    Ray has one switch for that, named for the systems where it is the default. It is read when Ray is
    imported, which may have happened here (hence the constant), and by every process that Ray starts.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False


def _quiet_ray_data() -> None:
    """Ray Data's console shows errors only; its file in the session's logs keeps everything."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for channel in logging.getLogger("ray.data").handlers:
        if type(channel).__name__ == "PlainRayHandler":
            channel.setLevel(logging.ERROR)
