"""A copy of the forkserver is in no way different from a worker that Ray starts itself."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import start_worker
from cluster.start_worker import OwnStart, request

# A program in Ray's place: what a worker can see of itself, on its standard output.
PROGRAM = """
import json, os, signal, sys

import helper
import numpy

print(json.dumps({
    "name": __name__,
    "arguments": sys.argv,
    "folder": os.getcwd(),
    "variables": dict(os.environ),
    "path": [each for each in sys.path if "site-packages" not in each],
    "leads_group": os.getpgrp() == os.getpid(),
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "child": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
    "open": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1],
    "helper": helper.__file__,
}))
print(os.getppid(), float(numpy.random.random()), file=sys.stderr)
"""

# Imports everything, and tells who asked for GPUs meanwhile.
ASKED = """
import importlib
import traceback

import torch

from cluster.forkserver import MODULES

asked = []
for name in ("is_available", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, name=name: asked.append((name, traceback.format_stack())))
for name in MODULES:
    importlib.import_module(name)
assert not asked, asked
"""
VARIABLES = dict(os.environ)


class Start:
    """Starts a program by `start_worker.py`, or by Ray's own program, with the same arguments."""

    def __init__(self, folder: Path, socket: str) -> None:
        self.folder, self.variables = folder, VARIABLES | {"DIFFRAY_FORKSERVER": socket}
        self.program = folder / "program.py"
        self.program.write_text(PROGRAM)
        (folder / "modules").mkdir(exist_ok=True)
        (folder / "modules" / "helper.py").touch()

    def __call__(self, environment: dict[str, str]) -> tuple[dict[str, Any], str]:
        """What the program says of itself, and what was written to standard error."""
        context = {
            "command_prefix": ["cd", f"'{self.folder}'", "&&"],
            "env_vars": {"PYTHONPATH": str(self.folder / "modules")} | environment,
            "py_executable": sys.executable,
            "override_worker_entrypoint": None,
            "java_jars": [],
        }
        ended = subprocess.run(
            [
                *(sys.executable, start_worker.__file__, str(self.program), "--worker-id=7"),
                *("--language=PYTHON", f"--serialized-runtime-env-context={json.dumps(context)}"),
            ],
            env=self.variables,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            process_group=0,  # as Ray starts workers
        )
        return json.loads(ended.stdout), ended.stderr


@pytest.fixture(scope="module")
def forkserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """The socket and the process id of a forkserver that has only begun to import."""
    socket = str(tmp_path_factory.mktemp("forkserver") / "socket")
    program = str(Path(start_worker.__file__).with_name("forkserver.py"))
    process = subprocess.Popen([sys.executable, program, socket], stdin=subprocess.PIPE, env=VARIABLES)
    while not Path(socket).exists():
        assert process.poll() is None
    yield socket, process.pid
    process.kill()
    process.communicate()


def test_a_copy_sees_what_a_process_of_its_own_sees(forkserver: tuple[str, int], tmp_path: Path) -> None:
    socket, server = forkserver
    variables = {"DIFFRAY_HOME": "${HOME}/pictures${NOTHING}"}
    copied, said = Start(tmp_path, socket)(variables)
    own, reason = Start(tmp_path, str(tmp_path / "nothing"))(variables)
    assert said.split()[0] == str(server)
    assert reason.startswith("a worker is started without the forkserver: [Errno 2] No such file")
    assert copied["variables"]["DIFFRAY_HOME"] == os.environ["HOME"] + "/pictures"
    # Ray's own program imports Ray and goes through a shell.
    for name in ("DIFFRAY_FORKSERVER", "RAY_CLIENT_MODE", "_", "PWD", "SHLVL", "OLDPWD"):
        copied["variables"].pop(name, None), own["variables"].pop(name, None)
    assert copied == own


def test_copies_draw_different_numbers(forkserver: tuple[str, int], tmp_path: Path) -> None:
    start = Start(tmp_path, forkserver[0])
    (_, first), (_, second) = start({}), start({})
    assert first.split()[0] == second.split()[0] == str(forkserver[1])
    assert first.split()[1] != second.split()[1]


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"OMP_NUM_THREADS": "3"}])
def test_a_variable_that_an_import_reads_needs_a_process_of_its_own(
    variables: dict[str, str], forkserver: tuple[str, int], tmp_path: Path
) -> None:
    told, reason = Start(tmp_path, forkserver[0])(variables)
    assert told["variables"].items() >= variables.items()
    assert f"its variable {next(iter(variables))} differs from the embedded Ray's" in reason


@pytest.mark.parametrize(
    "context",
    [
        {"py_executable": "uv run"},
        {"command_prefix": ["podman", "run", "image"]},
        {"override_worker_entrypoint": "/elsewhere.py"},
        {"java_jars": ["a.jar"]},
    ],
)
def test_a_command_of_its_own_needs_a_process_of_its_own(context: dict[str, Any]) -> None:
    with pytest.raises(OwnStart, match="its runtime environment has a command of its own"):
        request(["worker.py", f"--serialized-runtime-env-context={json.dumps(context)}"])


def test_a_worker_of_another_language_is_no_copy() -> None:
    with pytest.raises(OwnStart, match="its language is JAVA"):
        request(["io.ray.runtime.runner.worker.DefaultWorker", "--language=JAVA"])


def test_a_forkserver_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = Path(start_worker.__file__).with_name("forkserver.py")
    start = (
        "import subprocess, sys; "
        f"print(subprocess.Popen([sys.executable, {str(program)!r}, {str(tmp_path / 'socket')!r}], "
        "stdin=subprocess.PIPE).pid)"
    )
    started = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(started.stdout)).wait(60)
    assert not psutil.pid_exists(int(started.stdout))


@pytest.mark.slow
def test_no_import_asks_for_gpus() -> None:
    """Libraries keep the answer, and workers do not see the same GPUs."""
    root = Path(start_worker.__file__).parents[1]
    subprocess.run([sys.executable, "-c", ASKED], cwd=root, check=True, timeout=600)
