"""Machines of a Ray cluster, all on this one.

Linux namespaces give each its own network address, host name, process numbers and temporary folder.
They share the rest of the file system, as machines do that mount a volume. Needs root and iproute2.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
NETWORK = "10.77.0"
BRIDGE, OUTSIDE = "diffray-br", f"{NETWORK}.254"
HEAD = f"{NETWORK}.1"
GCS, JOBS, CLIENT, HTTP = 6379, 8265, 10001, 8000
STARTED = "Ray runtime started"
NONE: Mapping[str, str] = MappingProxyType({})

ENTER = """
hostname "$0"
for folder in "$1" /dev/shm; do mount -t tmpfs -o size=1g tmpfs "$folder"; done
shift
exec "$@"
"""
"""A machine's first process: takes its name and folders of its own, then becomes the command."""

SKEWED = """
import time

now, now_ns = time.time, time.time_ns
time.time = lambda: now() + {seconds}
time.time_ns = lambda: now_ns() + {seconds} * 10**9
"""
"""Python's clock of a machine whose clock is wrong, as sitecustomize.py; what is no Python keeps the right
one."""


def why_not() -> str:
    """Why there can be no such machines here; empty if there can."""
    if os.geteuid():
        return "network namespaces need root"
    if missing := [name for name in ("ip", "unshare") if not shutil.which(name)]:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "true"], check=False)
    return "namespaces are not permitted" if tried.returncode else ""


def wait_for(true: Callable[[], Any], what: str, timeout_s: float = 120) -> Any:
    """What `true` returns once it is true; what it raises until then is not."""
    deadline, last = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        try:
            if found := true():
                return found
        except Exception as error:  # whatever a cluster that is half there may answer
            last = repr(error)
        time.sleep(0.2)
    raise TimeoutError(f"{what}: not within {timeout_s} s {last}")


class Brake:
    """Lets a machine have a part of a core, by a group of Linux's CPU controller.

    Raises:
        OSError: the controller may not be used here.
    """

    def __init__(self, name: str, cores: float) -> None:
        root, period = Path("/sys/fs/cgroup"), 100_000
        first = root / "cpu" if (root / "cpu").is_dir() else root
        self.folder = first / f"diffray-{name}"
        self.folder.mkdir(exist_ok=True)
        if first == root:
            (self.folder / "cpu.max").write_text(f"{int(cores * period)} {period}")
        else:
            (self.folder / "cpu.cfs_period_us").write_text(str(period))
            (self.folder / "cpu.cfs_quota_us").write_text(str(int(cores * period)))

    @property
    def command(self) -> list[str]:
        """In front of another command: puts it into the group."""
        return ["sh", "-c", 'echo $$ > "$0"/cgroup.procs; exec "$@"', str(self.folder)]

    def held_back(self) -> float:
        """Of the periods in which the machine wanted a core, the share in which it had to wait for one."""
        stat = dict(line.split() for line in (self.folder / "cpu.stat").read_text().splitlines())
        return int(stat["nr_throttled"]) / max(1, int(stat["nr_periods"]))

    def release(self) -> None:
        """When none of its processes is left."""
        wait_for(lambda: not (self.folder / "cgroup.procs").read_text(), f"{self.folder} is empty", 20)
        self.folder.rmdir()


@dataclass
class Machine:
    """One that runs a command, which its other processes end with.

    Attributes:
        log: what the command printed.
    """

    name: str
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def cut_off(self) -> None:
        """As when its power goes: nobody is told, and the others' connections to it hang."""
        _ip("link", "set", _cable(self.name), "down")
        self.kill()

    def kill(self) -> None:
        """All its processes, at once."""
        self.process.kill()
        self.process.wait()

    def wait_until_started(self) -> None:
        def up() -> bool:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name}: {self.log.read_text()}")
            return STARTED in self.log.read_text()

        wait_for(up, self.log.read_text())


@dataclass
class Machines:
    """The machines of a test, and the switch that they are plugged into.

    Attributes:
        names: of all that will be, each with the address of its place in the list.
        folder: each machine has its own here, where Ray keeps its sessions.
        token: of the cluster.
    """

    names: Sequence[str]
    folder: Path
    logs: Path
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    running: dict[str, Machine] = field(default_factory=dict)

    def plug_in(self) -> None:
        hosts = "".join(f"{self.address(name)} {name}\n" for name in self.names)
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("address", "add", f"{OUTSIDE}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for name in self.names:
            _ip("netns", "add", name)
            _ip("link", "add", _cable(name), "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", _cable(name), "master", BRIDGE, "up")
            _ip("-n", name, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", name, "link", "set", device, "up")
            _hosts(name).parent.mkdir(parents=True)
            _hosts(name).write_text(f"127.0.0.1 localhost\n{hosts}")  # `ip netns exec` lays it over /etc

    def unplug(self) -> None:
        for machine in self.running.values():
            machine.kill()
        for name in self.names:
            _ip("link", "delete", _cable(name))  # a namespace may outlive its last process for a while
            _ip("netns", "delete", name)
            shutil.rmtree(_hosts(name).parent)
        _ip("link", "delete", BRIDGE)

    def address(self, name: str) -> str:
        return f"{NETWORK}.{1 + self.names.index(name)}"

    def run(
        self, name: str, *command: str, brake: "Brake | None" = None, more: Mapping[str, str] = NONE
    ) -> Machine:
        """Switch a machine on, with a command as its first process.

        Args:
            brake: makes it slow.
            more: environment of its processes.
        """
        first = ["sh", "-c", ENTER, name, str(self.folder)]
        held = brake.command if brake else []  # before /sys is another one's
        log = self.logs / f"{name}.log"
        inside = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        _ip("link", "set", _cable(name), "up")
        process = subprocess.Popen(
            [*held, "ip", "netns", "exec", name, *inside, *first, *command],
            cwd=ROOT,
            env={**self.environment(), **more},
            stdin=subprocess.DEVNULL,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        machine = self.running[name] = Machine(name, self.address(name), process, log)
        return machine

    def skewed(self, seconds: int) -> dict[str, str]:
        """What gives a machine's Python processes a clock that is so far ahead."""
        folder = self.logs / f"skewed-{seconds}"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(SKEWED.format(seconds=seconds))
        return {"PYTHONPATH": f"{folder}:{ROOT}"}

    def start_ray(
        self,
        name: str,
        *options: str,
        cpus: int,
        without: str = "",
        brake: "Brake | None" = None,
        more: Mapping[str, str] = NONE,
    ) -> Machine:
        """Switch a machine on as a node of the cluster: the first is its head.

        Args:
            without: a folder of the others, in whose place it has an empty one.
            brake: makes it slow.
        """
        place = ["--address", f"{HEAD}:{GCS}"]
        if self.address(name) == HEAD:
            place = ["--head", "--port", str(GCS), "--ray-client-server-port", str(CLIENT)]
            place += ["--dashboard-host", HEAD, "--dashboard-port", str(JOBS), "--temp-dir", str(self.folder)]
        limits = ["--num-cpus", str(cpus), "--object-store-memory", str(100 << 20)]
        command = [str(PROGRAMS / "ray"), "start", "--block", "--node-ip-address", self.address(name)]
        if without:
            command = ["sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', without, *command]
        return self.run(name, *command, *place, *limits, *options, brake=brake, more=more)

    def environment(self) -> dict[str, str]:
        """Of the machines' processes, and of those outside that know the token: as in the image, no more."""
        return {
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "HOME": os.environ["HOME"],
            "PYTHONPATH": str(ROOT),
            "DIFFRAY_HOME": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.folder),
            "OMP_NUM_THREADS": "1",
        }

    def outside(self, *command: str, timeout_s: float = 900) -> "subprocess.CompletedProcess[str]":
        """Run a command on no machine of the cluster, but with its token."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@contextmanager
def machines(names: Sequence[str], logs: Path) -> Iterator[Machines]:
    """A switch and places for machines, the first of which is to be the head; all are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="diffray-"))  # short: the names of Ray's sockets begin with it
    made = Machines(names, folder, logs)
    made.plug_in()
    try:
        yield made
    finally:
        made.unplug()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def redis(logs: Path) -> Iterator[str]:
    """A Redis that the machines reach; its address and password, joined by a space."""
    password = secrets.token_hex(16)
    process = subprocess.Popen(
        ["redis-server", "--bind", OUTSIDE, "--requirepass", password, "--save", "", "--dir", str(logs)],
        stdout=(logs / "redis.log").open("wb"),
    )
    try:
        yield f"{OUTSIDE}:6379 {password}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _cable(name: str) -> str:
    """The end of a machine's cable at the switch."""
    return f"veth-{name}"


def _hosts(name: str) -> Path:
    return Path("/etc/netns", name, "hosts")
