"""Start an embedded Ray on this machine, and stop it again."""

import json
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.capacity import sized
from ray_jobs.config import ConfigError, LocalConfig, home
from ray_jobs.console import show

START_TIMEOUT_S = 180
"""Timeout of one start of the embedded Ray, in seconds: a loaded machine with 2 cores needs 40."""

STARTS = 3
"""Number of attempts to start Ray."""

PORT_FILE = "Timed out waiting for file"
"""Message of a raylet of Ray 2.60 before it aborts: it waits 15 s for its agent's ports, and no setting
changes that. An agent takes longer if its imports come from a cold disk, are not compiled, or wait for a
core; the next one has them in memory."""

QUIET = {"RAY_DATA_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Environment of drivers and workers: no progress bars by Ray, no tokenizers warning at each fork."""

KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""Environment of the embedded Ray's processes. Otherwise glibc returns the memory of each large tensor to the
system and gets it back page by page for the next one: a quarter of an encoder's time, on two cores."""

ONE_MACHINE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Environment of the embedded Ray's processes. Its only machine is never preempted, so each training saves
the process that watches for that."""

HIDE_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""Environment of every Ray node. Otherwise tasks and actors that reserve no GPU see all of them, and a
library that asks whether there is one, such as DeepSpeed, puts a CPU run's tensors on it."""

PATIENCE = {
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(START_TIMEOUT_S),
    "RAY_gcs_server_port_wait_time_s": str(START_TIMEOUT_S),
    "RAY_agent_register_timeout_ms": str(START_TIMEOUT_S * 1000),
}
"""Environment of the embedded Ray's head. Ray's own timeouts, 30 to 60 s, are too short for a cold disk."""


@dataclass(frozen=True)
class LocalCluster:
    """The embedded Ray.

    Attributes:
        address: address of the Jobs API (and dashboard), on the loopback interface.
        gcs_address: address for `ray.init(address=...)`.
        logs: folder of Ray's logs.
    """

    address: str
    gcs_address: str
    logs: Path


class NotStartedError(Exception):
    """Ray did not start; another attempt may succeed.

    Attributes:
        log: the log file that shows the cause.
    """

    def __init__(self, reason: str, log: Path) -> None:
        super().__init__(reason)
        self.log = log


@contextmanager
def local_cluster(local: LocalConfig) -> Iterator[LocalCluster]:
    """Start Ray on this machine, on loopback addresses only, protected by a token; stop it at the end.

    It uses free ports and a folder of its own, so another Ray on this machine, an occupied port, leftovers
    of a killed run, or RAY_ADDRESS do not matter. Ray runs under a separate process (`cluster/embedded.py`)
    that stops it when this process ends or is killed. A head that does not start is started again.

    Raises:
        ConfigError: Ray does not start; the error names the fix and the log. No process is left.
    """
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(QUIET | KEEP_MEMORY | ONE_MACHINE | HIDE_GPUS)
    _require_token()
    _stay_on_loopback()
    for start in range(1, STARTS + 1):
        head = Head(sized(local))
        try:
            cluster = head.wait()
            break
        except NotStartedError as error:
            head.end()
            if start == STARTS:
                raise ConfigError(
                    f"local: Ray did not start on this machine in {STARTS} attempts ({error}); stop other "
                    "programs, or run `make setup`, which compiles Python's bytecode, and try again; "
                    f"log: {error.log}"
                ) from None
            show(f"Ray did not start ({error}); trying again")
        except BaseException:
            head.end()
            raise
    try:
        yield cluster
    finally:
        head.stop()


class Head:
    """A head node of Ray that is starting or up, with its own folder and ports."""

    def __init__(self, local: LocalConfig) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="diffray-"))
        self.log, port = self.folder / "start.log", _free_port()
        settings = {
            "num_cpus": local.num_cpus,
            "object_store_memory": local.object_store_mb * 2**20,
            "temp_dir": str(self.folder / "ray"),
            "gcs_server_port": port,
            "node_ip_address": "127.0.0.1",
            "include_dashboard": True,
            # It would send workers' output to drivers, which do not print it (`joined`).
            "include_log_monitor": False,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": _free_port(),
            "dashboard_agent_listen_port": 0,
            # The raylet does not wait for a port that is given.
            "runtime_env_agent_port": _free_port(),
        }
        own = {
            # For Ray Train: otherwise its processes ask the Ray that was started last on this machine whether
            # a training is still wanted, and end it if that Ray does not know it.
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "RAY_TMPDIR": str(self.folder),
            "RAY_worker_niceness": str(local.niceness),
            # The socket of `cluster/forkserver.py`.
            "DIFFRAY_FORKSERVER": str(self.folder / "forkserver"),
            # Ray Train's workers run in their own folders; relative paths must start at this process's.
            "DIFFRAY_HOME": str(home()),
        }
        environment = os.environ | PATIENCE | own
        # So that Ray's processes compile bytecode only once.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        with open(self.log, "wb") as errors:
            self.holder = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("embedded.py")), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
            )

    def wait(self) -> LocalCluster:
        """Return once the Jobs API answers.

        Raises:
            NotStartedError: Ray ends, its raylet dies, or nothing answers in time.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        words = self._first_line(deadline).split()
        cluster = LocalCluster(f"http://{words[1]}", words[0], Path(words[2]))
        from ray.job_submission import JobSubmissionClient

        while True:
            try:
                JobSubmissionClient(cluster.address).list_jobs()
                return cluster
            except (ConnectionError, RuntimeError):
                self._check_alive(deadline)
                time.sleep(0.5)

    def _first_line(self, deadline: float) -> str:
        """Return the line that the holder process prints once the head is up."""
        stdout = self.holder.stdout
        assert stdout is not None
        while not select.select([stdout], [], [], 0.5)[0]:
            self._check_alive(deadline)
        line = stdout.readline().decode()
        if not line:
            self._check_alive(deadline)
            raise NotStartedError(_last_line(self.log) or "it ended at once", self.log)
        return line

    def _check_alive(self, deadline: float) -> None:
        raylet = self.folder / "ray" / "session_latest" / "logs" / "raylet.err"
        if raylet.exists() and PORT_FILE in raylet.read_text(encoding="utf-8", errors="replace"):
            raise NotStartedError("its agent did not start within 15 s", raylet.resolve())
        if time.monotonic() > deadline:
            raise NotStartedError(f"no answer after {START_TIMEOUT_S} s", self.log)

    def stop(self) -> None:
        """Shut Ray down in an orderly way."""
        assert self.holder.stdin is not None
        self.holder.stdin.close()
        self.holder.wait()
        shutil.rmtree(self.folder / "ray" / "session_latest" / "runtime_resources", ignore_errors=True)

    def end(self) -> None:
        """Kill every process of a Ray that did not start, including an agent whose raylet is gone."""
        self.holder.kill()
        self.holder.wait()
        for process in psutil.process_iter():
            try:
                if process.environ().get("RAY_TMPDIR") == str(self.folder):
                    process.kill()
                    process.wait(10)
            except psutil.Error:  # ended meanwhile, or another user's
                continue


def _last_line(log: Path) -> str:
    """Return the last line of a log, at most 300 characters; in a traceback it names the error."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""


def _free_port() -> int:
    """Return a free port on the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _require_token() -> None:
    """Turn on token authentication for this process and its children, with a new token if none is set."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray reads its settings at import; if it is already imported, it must read them again.
    from ray import _raylet

    _raylet.Config.initialize("")  # type: ignore[attr-defined]
    _raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]


def _stay_on_loopback() -> None:
    """Make Ray use 127.0.0.1 as this machine's address instead of an external one.

    Ray has one switch for this, named after the systems where it is the default. Ray reads it at import,
    which may already have happened here (hence the constant), and in every process that it starts.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False
