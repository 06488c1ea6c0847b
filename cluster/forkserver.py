"""The process that the embedded Ray's workers are copied from; started by `cluster/embedded.py`, not by hand.

    python forkserver.py SOCKET

A worker that imports torch, transformers and diffusers by itself takes 5 to 15 s of a core for it, and a
search starts dozens of workers. This process imports them once. For each worker, `cluster/start_worker.py`
asks it for a copy of itself (fork), which then runs Ray's worker program. Copies share their memory.

It begins to import with the first request, when Ray is up, whose agent has but 15 s to start. It answers
between two imports too; a worker of the first seconds imports by itself what is still missing. The kernel
ends it with the process that started it.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

MODULES = (
    *("numpy", "pandas", "pyarrow.parquet", "torch", "torch._dynamo", "scipy.stats", "transformers.utils"),
    *("transformers.modeling_utils", "transformers.models.clip.modeling_clip", "peft", "diffusers.utils"),
    *("diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl"),
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
)
"""What most workers import, in steps of at most 3 s of a core: a request waits for the end of one. None asks
for GPUs, of which each worker sees others, or starts CUDA, which no copy could use. Not Ray, whose native
part reads a worker's variables when it is imported, and no code of ours, which jobs bring along."""

OWN_VARIABLES = (
    *("RAY_", "DIFFRAY_", "PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "CUDA_VISIBLE_DEVICES"),
    *("SPT_NOENV", "PL_DISABLE_FORK"),  # set by Ray, for the titles of its processes and for Lightning
)
"""Beginnings of the environment variables that a worker may have of its own: no import of `MODULES` reads
them. With any other, such as another HF_HOME, it starts without this process."""

PR_SET_PDEATHSIG = 1


class Start(NamedTuple):
    """What this process was started with, and workers are given: its variables, and how it takes signals."""

    environment: dict[str, str]
    interrupt: Any
    child_ended: Any


def serve(path: str) -> None:
    """Import `MODULES`, and fork a worker for each request at the socket."""
    start = Start(
        dict(os.environ),
        signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.signal(signal.SIGCHLD, signal.SIG_IGN),  # the kernel removes workers that have ended
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(128)
        select.select([listener], [], [])
        for name in MODULES:
            while select.select([listener], [], [], 0)[0]:
                answer(listener, start)
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # or a worker's first collection would write to, and so copy, every page
        while True:
            answer(listener, start)


def end_with_parent() -> None:
    """Have the kernel kill this process once its parent has ended; workers end with their Ray."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if select.select([sys.stdin], [], [], 0)[0]:  # it has ended before that
        sys.exit()


def answer(listener: socket.socket, start: Start) -> None:
    """Fork a worker for the next request."""
    with listener.accept()[0] as connection:
        try:
            worker = os.fork()
        except OSError as error:  # no memory or process left: the asking process starts the worker
            print(f"no worker was forked: {error}", file=sys.stderr, flush=True)
            return
        if worker == 0:
            listener.close()
            become_worker(connection, start)


def become_worker(connection: socket.socket, start: Start) -> NoReturn:
    """Run the program of a request in this copy, as Python would in a new process.

    Args:
        connection: it brings the standard streams, and JSON of `start_worker.request`. The answer is empty if
            this copy can become that worker, else the reason.
        start: of the process that was copied.
    """
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("r", encoding="utf-8") as lines:
        request = json.loads(lines.readline())
    reason = hindrance(start.environment, request["environment"])
    connection.sendall(f"{reason}\n".encode())
    connection.close()
    if reason:
        sys.exit()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGINT, start.interrupt)
    signal.signal(signal.SIGCHLD, start.child_ended)
    if request["leads_group"]:  # Ray ends a worker's own processes by their group
        os.setpgid(0, 0)
    if request["oom_score_adj"]:
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["arguments"]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [str(Path(sys.argv[0]).parent), *filter(None, inherited)]
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # or all copies would draw the same; `random` seeds itself anew
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


def hindrance(here: dict[str, str], there: dict[str, str]) -> str:
    """Return why a copy of this process cannot be a worker with other variables; empty if it can."""
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name) and not name.startswith(OWN_VARIABLES):
            return f"its variable {name} differs from the embedded Ray's"
    torch: Any = sys.modules.get("torch")
    if torch and torch.cuda._is_in_bad_fork():
        return "importing the modules started CUDA"
    return ""


if __name__ == "__main__":
    # Workers look for modules neither in this folder nor where only this process was told to.
    told = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [each for each in sys.path[1:] if each not in told]
    end_with_parent()
    serve(sys.argv[1])
