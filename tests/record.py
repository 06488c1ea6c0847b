"""What a fault cost, for the table of `benchmarks/faults.py`."""

import json
import os
from pathlib import Path

TABLE = "DIFFRAY_FAULTS"
"""Environment variable: the file that each test adds a line of JSON to; without it they only print."""


def record_fault(fault: str, *, recovery_s: float | None, lost: str) -> None:
    """
    Args:
        fault: what was done.
        recovery_s: seconds until work went on, or to the last failed answer; None: not timed.
        lost: what had to be done again, or failed.
    """
    line = json.dumps({"fault": fault, "recovery_s": recovery_s, "lost": lost})
    print(line)
    if path := os.environ.get(TABLE):
        with Path(path).open("a") as table:
            table.write(line + "\n")
