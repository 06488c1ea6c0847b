"""python -m benchmarks.gpu [--phases probe train evaluate serve together] [--size full|small] [--results F]

What one GPU gives, in eight minutes: no Ray, no network, no files but this tree's. Models have the published
sizes and random weights that are made on the device; seeds are fixed.

probe: the device, and the rates of a product of matrices and of a copy.
train: training as it runs, and compiled, beside diffusers' plain loop in the same process.
evaluate: pictures in bf16 and fp32, decoding, features, the score with its error.
serve: the engine with adapters, and its steps beside the bare denoiser.
packed: trials of a search that are trained together.
together: training, an evaluator and the engine in three processes.

Each phase is a new process, and is stopped after its time; what it has measured by then counts. After each
phase comes a line of JSON, and all lines so far are written to the results. Last come the gates, of which one
that is missed fails the command. Without a GPU, small models run on the CPU, which shows only that all works:
there are no gates, and nothing is written unless --results names a file.
"""

import argparse
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from benchmarks.gpu.gates import gates_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
# Seconds of each phase, its start and the making of weights included: eight minutes in all.
SECONDS = {"probe": 15, "train": 200, "evaluate": 70, "serve": 95, "packed": 40, "together": 60}

Figures = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--phases", nargs="+", choices=tuple(SECONDS), default=list(SECONDS))
    parser.add_argument("--size", choices=("full", "small"), help="small: small models, on any device")
    parser.add_argument("--results", type=Path, help="file that is written after each phase")
    parser.add_argument("--seconds", type=float, help="of each phase, instead of its own")
    parser.add_argument("--here", action="store_true", help="run one phase in this process")
    arguments = parser.parse_args()
    if arguments.here:
        return run_here(arguments.phases[0], arguments.size)
    import torch

    full = arguments.size == "full" or (arguments.size is None and torch.cuda.is_available())
    size = "full" if full else "small"
    if full and not torch.cuda.is_available():
        parser.error("--size full: there is no GPU here")
    if not full:
        print("small models: this shows that it runs, its figures say nothing", flush=True)
    results = arguments.results or (RESULTS if full else None)
    record: Figures = {"size": size, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    for phase in arguments.phases:
        record[phase] = run_phase(phase, size, arguments.seconds or SECONDS[phase])
        print(json.dumps({"phase": phase, **record[phase]}), flush=True)
        if results:
            results.parent.mkdir(parents=True, exist_ok=True)
            results.write_text(json.dumps(record, indent=1) + "\n")
    failed = [phase for phase in arguments.phases if '"error"' in json.dumps(record[phase])]
    gates = gates_of(record, arguments.phases) if full else []
    for gate in gates:
        print(gate.line(), flush=True)
    return 1 if failed or not all(gate.passed for gate in gates) else 0


def run_phase(phase: str, size: str, seconds: float) -> Figures:
    """Run a phase in a new process; return its figures by case, and `cut` or `error` where it did not end."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--here", "--phases", phase, "--size", size]
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    begin, found = time.monotonic(), Figures()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    # The phase's own processes are in its session.
    timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            found |= json.loads(line)
    code = process.wait()
    timer.cancel()
    taken = time.monotonic() - begin
    if code == -signal.SIGKILL and taken >= seconds:
        found["cut"] = f"stopped after {seconds:g} seconds; what is missing was not measured"
    elif code:
        found.setdefault("error", f"ended with {code}")
    return found | {"seconds": round(taken, 1)}


def run_here(phase: str, size: str) -> int:
    """Run a phase in this process, and print each case as a line of JSON."""
    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    try:
        for case, figures in importlib.import_module(f"benchmarks.gpu.{phase}").run(size):
            print(json.dumps({case: figures}), flush=True)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
