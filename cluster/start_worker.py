"""The program by which the embedded Ray starts a worker, in place of Ray's own `setup_worker.py`.

It asks `cluster/forkserver.py` for a copy that becomes the worker, and ends. If none answers, or the worker
needs more than a copy (a container, another Python, a variable that an import reads), it gives way to Ray's
own program; the reason is in `raylet.err`.
"""

import importlib.util
import json
import os
import re
import shlex
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn


class OwnStart(Exception):
    """The worker must be started by Ray's own program; the message says why."""


def main(arguments: list[str]) -> None:
    """Start a worker with the arguments that Ray gives to `setup_worker.py`."""
    environment = dict(os.environ)
    try:
        ask(request(arguments))
    except (OwnStart, OSError) as error:
        print(f"a worker is started without the forkserver: {error}", file=sys.stderr, flush=True)
        start(arguments, environment)


def request(arguments: list[str]) -> dict[str, Any]:
    """Return what a copy must know to become the worker: `arguments` (the program first), `environment`,
    `folder`, and, as this process has them from Ray, `leads_group` and `oom_score_adj`.

    Raises:
        OwnStart: the runtime environment asks for more than variables and a folder.
    """
    own = {"--serialized-runtime-env-context": "{}", "--language": "PYTHON"}
    passed = []
    for each in arguments:
        name, _, value = each.partition("=")
        if name in own:
            own[name] = value
        else:
            passed.append(each)
    context = json.loads(own["--serialized-runtime-env-context"])
    for name, value in context.pop("env_vars", {}).items():
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))  # as Ray does
    prefix = context.pop("command_prefix", [])
    folder = os.getcwd()
    if len(prefix) == 3 and (prefix[0], prefix[2]) == ("cd", "&&"):  # of a working_dir
        (folder,) = shlex.split(prefix[1])
        prefix = []
    if context.pop("py_executable", sys.executable) != sys.executable or prefix or any(context.values()):
        raise OwnStart("its runtime environment has a command of its own")
    if own["--language"] != "PYTHON":
        raise OwnStart(f"its language is {own['--language']}")
    score = ""
    with suppress(FileNotFoundError):
        score = Path("/proc/self/oom_score_adj").read_text()
    return {
        "arguments": passed,
        "environment": dict(os.environ),
        "folder": folder,
        "leads_group": os.getpgrp() == os.getpid(),
        "oom_score_adj": score,
    }


def ask(worker: dict[str, Any]) -> None:
    """Have the forkserver copy itself for a worker.

    Raises:
        OwnStart: the copy cannot become this worker.
        OSError: no forkserver answers.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["DIFFRAY_FORKSERVER"])
        socket.send_fds(connection, [b"\n"], [0, 1, 2])
        connection.sendall(json.dumps(worker).encode() + b"\n")
        with connection.makefile("r", encoding="utf-8") as lines:
            reason = lines.readline()
    if reason != "\n":
        raise OwnStart(reason.strip() or "the forkserver did not answer")


def start(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Become Ray's own program."""
    ray = importlib.util.find_spec("ray")
    assert ray and ray.submodule_search_locations
    program = Path(ray.submodule_search_locations[0], "_private", "workers", "setup_worker.py")
    os.execve(sys.executable, [sys.executable, str(program), *arguments], environment)


if __name__ == "__main__":
    main(sys.argv[1:])
