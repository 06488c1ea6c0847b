"""What is done to a run and to its machines, and what it costs: recovery, and work that is lost.

    python -m benchmarks.faults

Runs the tests that do it and writes what each found to benchmarks/results/faults.json. Machines in network
namespaces and small disks need root, iproute2 and redis-server. Unless all tests ran and passed, nothing is
written: a table with holes would say less than it seems to.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from ray_jobs.console import columns, show
from tests.record import TABLE

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "faults.json"
TESTS = [  # what needs no Ray before what starts one in this process, as in `make test`
    "tests/unit/test_busy_storage.py",
    "tests/unit/test_lease.py",
    "tests/serving/test_cold_start.py",
    "tests/faults",
    "tests/ray/test_prepare.py::test_kills_in_the_middle_of_encoding_leave_no_trace_in_the_result",
    "tests/ray/test_training.py"
    "::test_a_training_that_dies_while_it_writes_a_checkpoint_ends_with_the_very_same_state",
    "tests/ray/test_search.py::test_a_stopped_trial_frees_its_workers_at_once_and_the_evaluators_outlive_it",
    "tests/ray/test_pipeline.py"
    "::test_the_pipeline_runs_end_to_end_through_kills_and_is_skipped_when_it_is_done",
    "tests/serving/test_registry_watcher.py",
]


def not_run(code: int, report: Path) -> str:
    """What is missing to a whole table; empty where nothing is."""
    if code:
        return f"pytest ended with {code}"
    cases = ElementTree.parse(report).iter("testcase")
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    return f"skipped: {', '.join(map(str, skipped))}" if skipped else ""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "faults.jsonl")
        table.touch()
        report = Path(folder, "report.xml")
        code = subprocess.call(
            [sys.executable, "-m", "pytest", *TESTS, f"--junitxml={report}"],
            cwd=ROOT,
            env=os.environ | {TABLE: str(table)},
        )
        if missed := not_run(code, report):
            show(f"{RESULTS} is not written: {missed}")
            return code or 1
        found = [json.loads(line) for line in table.read_text().splitlines()]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    rows = [["fault", "recovery", "lost"]]
    for each in found:
        seconds = each["recovery_s"]
        rows.append([each["fault"], "" if seconds is None else f"{seconds:.0f} s", each["lost"]])
    for line in columns(rows):
        show(line)
    return code


if __name__ == "__main__":
    sys.exit(main())
