"""From submitting a job to its first training step: where the time goes, in a first job and in a second one.

Both are submitted as a user does, by `cluster.submit`, to a Ray that was started for the first. What the
driver does is timed by the lines that it prints, as they arrive here; what a worker does, by what it leaves
in its first checkpoint.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.data.measuring import in_fresh_process
from benchmarks.data.pictures import ROOT, smooth, write_folder
from benchmarks.train.measuring import SMALL_PICTURES
from cluster.local import local_cluster
from ray_jobs.config import LocalConfig

RATES = {"first": 1e-3, "second": 9e-4}  # of the two jobs: another one is another training
STEPS = 2
# What the driver prints when a phase is over, and the phase.
LINES = (("framework logs:", "job and its imports"), ("prepare ", "joining Ray"), ("train ", "prepare"))


def run(size: str) -> dict[str, Any]:
    figures = in_fresh_process(measure, size)
    for name, phases in figures.items():
        told = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items() if phase != "all")
        print(f"{name} job: {phases['all']:.1f} s to the first step: {told}", flush=True)
    ratio = figures["second"]["all"] / figures["first"]["all"]
    print(f"ratio: the second job takes {ratio:.2f} of the first one's time to its first step", flush=True)
    return {"figures": figures, "ratio": ratio}


def measure(size: str) -> dict[str, dict[str, float]]:
    """Seconds by phase, of both jobs."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="diffray-benchmark-") as name:
        folder = Path(name)
        pictures = ROOT / "examples" / "fluent-emoji"
        if size == "small":
            pictures = folder / "pictures"
            write_folder(pictures, SMALL_PICTURES, smooth)
        begin = time.time()
        with local_cluster(LocalConfig()) as cluster:
            ray = time.time() - begin
            for job, rate in RATES.items():
                phases = submit(cluster.address, folder / "runs", pictures, rate)
                found[job] = {"Ray": ray if job == "first" else 0.0, **phases}
                found[job]["all"] = sum(found[job].values())
    return found


def submit(address: str, storage: Path, pictures: Path, rate: float) -> dict[str, float]:
    """Seconds by phase of a job that trains a few steps."""
    overrides = {
        "storage": storage,
        "data.source": pictures,
        "model.base": ROOT / "models" / "emoji-base",
        "train.learning_rate": rate,
        "search.ladder": f"[{STEPS}]",
    }
    settings = [part for field, value in overrides.items() for part in ("--set", f"{field}={value}")]
    config = ["--config", "configs/demo.yaml"]
    stage = [sys.executable, "-m", "ray_jobs.train", *config, *settings]
    command = [sys.executable, "-m", "cluster.submit", "--address", address, *config, "--", *stage]
    ends, output = {"": time.time()}, []
    waited = list(LINES)
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        for line in job.stdout:
            output.append(line)
            if waited and waited[0][0] in line:
                ends[waited.pop(0)[1]] = time.time()
    if job.returncode or waited:
        raise RuntimeError(f"the job ended with {job.returncode}: {''.join(output[-5:])}")
    [checkpoint] = storage.glob(f"demo/train/lr-{rate:g}/step-*")
    worker = json.loads((checkpoint / "progress.json").read_text())["startup_seconds"]
    ends["start of the workers"] = worker.pop("began")
    times = list(ends.values())
    spent = [end - begin for begin, end in zip(times, times[1:], strict=False)]
    return dict(zip(list(ends)[1:], spent, strict=True)) | worker
