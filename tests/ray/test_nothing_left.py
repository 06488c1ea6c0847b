"""The embedded Ray ends with the command that started it, whatever ends that."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.interruptible import interruptible

pytestmark = pytest.mark.ray  # it has the machine to itself
ROOT = Path(__file__).resolve().parents[2]
SLEEP = [sys.executable, "-c", "import time; print('running', flush=True); time.sleep(300)"]
LEFT_S = 120


@pytest.fixture
def folder() -> Iterator[Path]:
    """For temporary files; short, since the names of Ray's sockets begin with it."""
    made = Path(tempfile.mkdtemp(prefix="left-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def of(folder: Path) -> list[str]:
    """The command lines of the living processes that were told to put their temporary files there."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended meanwhile, or another user's
            continue
    return found


def left_of(folder: Path) -> list[str]:
    """Return what `of` still finds when processes have had time to end."""
    gone = time.monotonic() + LEFT_S
    while (left := of(folder)) and time.monotonic() < gone:
        time.sleep(0.2)
    return left


@pytest.mark.parametrize(
    ("ended_by", "code"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        # Minutes each: what may be left is waited for.
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.journeys),
        pytest.param(None, 2, marks=pytest.mark.journeys),
    ],
)
def test_no_process_of_the_embedded_ray_is_left(folder: Path, ended_by: int | None, code: int) -> None:
    """By kill -9, by Ctrl-C, and by a job that finds what its user must mend."""
    config = folder / "run.yaml"
    run = {
        "name": "left",
        "storage": str(folder / "runs"),
        "data": {"source": str(folder / "no-pictures")},
        "model": {"base": "model"},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
    }
    config.write_text(yaml.safe_dump(run))
    job = SLEEP if ended_by else [sys.executable, "-m", "ray_jobs.prepare", "--config", str(config)]
    process = subprocess.Popen(
        interruptible([sys.executable, "-m", "cluster.submit", "--config", str(config), "--", *job]),
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(600, process.kill)
    watchdog.start()
    assert process.stdout is not None
    said = process.stdout.readline()
    while ended_by and not said.startswith("running"):
        assert said, "the job ended before it began"
        said = process.stdout.readline()
    assert any("raylet" in line for line in of(folder)) or not ended_by
    if ended_by == signal.SIGKILL:
        process.kill()
    elif ended_by:
        os.killpg(process.pid, ended_by)  # as a terminal does
    process.stdout.read()
    assert process.wait() == code
    watchdog.cancel()
    assert left_of(folder) == []
