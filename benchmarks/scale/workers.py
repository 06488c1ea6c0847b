"""Workers of one training: the time until it takes steps, that of a step, and what the processes hold."""

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.data.measuring import PeakMemory, in_fresh_process, tree_memory
from benchmarks.data.memory import write_tiny_model
from benchmarks.data.pictures import configured, smooth, write_folder
from benchmarks.scale.memory import largest
from cluster.connect import joined
from cluster.local import local_cluster
from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.data.preparation import prepare
from ray_jobs.training.checkpoint import PROGRESS, SERIES, folder_of
from ray_jobs.training.trainer import build_trainer

SIZES = (1, 2, 4, 8, 16)
PICTURES = 96
STEPS = 12
OTHERS = 4  # logical CPUs beside the workers' own
SPARE = 1.5  # times the memory that the workers before took, for each of the next ones


def run(sizes: list[int]) -> dict[str, Any]:
    """Sizes for which this machine has too little memory are left out, and named."""
    rows: list[dict[str, float]] = []
    left_out: list[int] = []
    with tempfile.TemporaryDirectory(prefix="diffray-benchmark-") as name:
        folder = Path(name)
        in_fresh_process(write_tiny_model, folder / "model")
        write_folder(folder / "pictures", PICTURES, smooth)
        in_fresh_process(prepare_pictures, folder)
        for size in sizes:
            a_worker = rows[-1]["all_mib"] / rows[-1]["size"] if rows else 0.0
            if SPARE * size * a_worker * 2**20 > psutil.virtual_memory().available:
                left_out.append(size)
                continue
            rows.append(in_fresh_process(measure, folder, size))
    return {"batch_size": max(SIZES), "steps": STEPS, "left_out": left_out, "sizes": rows}


def settings(folder: Path, workers: int) -> Config:
    """A row a worker at the largest size, so that a step's arithmetic is the same at each."""
    return configured(
        folder / "pictures",
        folder / "runs",
        f"model.base={folder / 'model'}",
        f"train.batch_size={max(SIZES)}",
        f"train.num_workers={workers}",
        "train.lora.target_modules=[to_q,to_v]",
        f"search.ladder=[{STEPS}]",
        f"local.num_cpus={workers + OTHERS}",
    )


def prepare_pictures(folder: Path) -> None:
    config = settings(folder, 1)
    with local_cluster(config.local) as cluster, joined(cluster.gcs_address):
        prepare(config)


def measure(folder: Path, size: int) -> dict[str, float]:
    """Seconds from asking for the workers to the end of their first step, of a step, and of the whole; MiB
    of the driver and of all processes beside what Ray took before."""
    config = settings(folder, size)
    with local_cluster(config.local) as cluster, joined(cluster.gcs_address):
        dataset = prepare(config)
        idle = tree_memory() / 2**20
        with PeakMemory() as peak:
            begin = time.time()
            build_trainer(config, dataset, name=f"workers-{size}").fit()
            seconds = time.time() - begin
    training = Storage.open(config.storage).child(config.name, "train", f"workers-{size}")
    checkpoint = training.child(folder_of(STEPS))
    ends = [row["time"] for row in json.loads(checkpoint.read_text(SERIES))]
    startup = json.loads(checkpoint.read_text(PROGRESS))["startup_seconds"]
    return {
        "size": size,
        "start_s": ends[0] - begin,
        "until_worker_s": startup["began"] - begin,
        "step_s": median(later - end for end, later in zip(ends, ends[1:], strict=False)),
        "whole_s": seconds,
        "driver_mib": largest(),
        "all_mib": peak.mib - idle,
    }
