"""Console output of a run: one line per event, starting with the stage."""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
GIB = 2**30
_STARTED = time.monotonic()
_phases = [("starting", _STARTED)]
_terminal: TextIO | None = None  # output for lines after the frameworks' output is redirected to a file


def clock(seconds: float) -> str:
    """Format seconds as minutes and seconds: 75.2 -> `1:15`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def quiet_logs() -> Path:
    """Redirect everything that frameworks print and log in this process to a file, and return its path.

    Only `show` and `say` still reach the console. File descriptors are redirected because native code and
    Ray's own printing bypass Python logging.
    """
    global _terminal
    descriptor, name = tempfile.mkstemp(prefix="diffray-", suffix=".log")
    sys.stdout.flush()
    sys.stderr.flush()
    _terminal = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(filename=name, level=logging.INFO, format=LOG_FORMAT)
    logging.captureWarnings(True)
    return Path(name)


def show(line: str) -> None:
    """Print a line that the user must see."""
    print(line, file=_terminal or sys.stdout, flush=True)


def complain(error: Exception) -> int:
    """Print an error that the user must fix, and return the command's exit code, 2."""
    show(f"error: {error}")
    return 2


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows as lines of aligned columns, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def human_size(size: float) -> str:
    """Format bytes as GiB, or MiB below one GiB."""
    return f"{size / GIB:>10,.2f} GiB" if size >= GIB else f"{size / 2**20:>10,.1f} MiB"


def say(stage: str, message: str) -> None:
    """Print one progress line, with the time since the start of the job."""
    show(f"[{clock(time.monotonic() - _STARTED):>5}] {stage:<8} {message}")


def phase(name: str) -> None:
    """Start a phase of a run before its first training step."""
    _phases.append((name, time.monotonic()))


def tell_phases() -> None:
    """Print the duration of every phase up to now; only the first call, after a training step, prints."""
    if len(_phases) > 1:
        ends = [begun for _, begun in _phases[1:]] + [time.monotonic()]
        took = [f"{name} {clock(end - begun)}" for (name, begun), end in zip(_phases, ends, strict=True)]
        say("train", f"first steps; until here {', '.join(took)}")
    _phases.clear()
