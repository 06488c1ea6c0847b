"""What this process holds in memory, in MiB."""

from pathlib import Path

import psutil


def resident() -> float:
    """Now."""
    return float(psutil.Process().memory_info().rss) / 2**20


def largest() -> float:
    """At most since its program began; what `getrusage` tells would be its parent's, if that is larger."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [told] = [line for line in lines if line.startswith("VmHWM:")]
    return int(told.split()[1]) / 2**10
