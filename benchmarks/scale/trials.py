"""Trials of a search that train nothing: what Tune and the search's own driver take for each."""

import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
from ray import tune

from benchmarks.data.measuring import in_fresh_process
from benchmarks.data.pictures import ROOT, configured
from benchmarks.scale.memory import largest, resident
from cluster.connect import joined
from cluster.local import local_cluster
from cluster.promise import Promise
from cluster.storage import Storage
from ray_jobs.config import LocalConfig
from ray_jobs.run.records import RungRow
from ray_jobs.training.tracking import Mirror
from ray_jobs.tuning.driver import Trials
from ray_jobs.tuning.scheduling import run_trials
from ray_jobs.tuning.trial import Make, SearchContext, reported

SIZES = (1, 4, 16, 64)
AT_ONCE = 2


def run(sizes: list[int]) -> dict[str, Any]:
    return {"at_once": AT_ONCE, "sizes": [in_fresh_process(measure, size) for size in sizes]}


def climb(space: dict[str, Any], *, make: Make, around: SearchContext) -> None:
    """Reports the rungs of a trial at once."""
    trial = make(space)
    for step in trial.ladder:
        row = {"step": step, "fid": 100.0, "train_loss": 0.1, "images_per_second": 10.0, "checkpoint": ""}
        tune.report(reported(RungRow.model_validate(trial.labels(around.config) | row)))


def measure(size: int) -> dict[str, float]:
    """Seconds and memory of a search of so many trials, none of which is stopped."""
    with tempfile.TemporaryDirectory(prefix="diffray-benchmark-") as folder:
        rates = [float(f"{rate:.3g}") for rate in np.geomspace(1e-6, 1e-2, size)]
        config = configured(
            ROOT / "examples" / "fluent-emoji",
            Path(folder),
            f"search.learning_rates={rates}",
            "search.scheduler=none",
            f"search.max_concurrent_trials={AT_ONCE}",
        )
        storage = Storage.open(config.storage).child(config.name, "search")
        with local_cluster(LocalConfig(num_cpus=AT_ONCE + 2)) as cluster, joined(cluster.gcs_address):
            before = resident()
            dataset = none = cast(Any, None)
            around = SearchContext(config, dataset, Promise(none, Future()), none)
            done = Trials(around, storage, Mirror(config, {}, "digest", list), climb)
            start = time.perf_counter()
            run_trials(config, done)
            seconds = time.perf_counter() - start
        if done.errors:
            raise RuntimeError(done.errors[0])
        assert len(done.rows) == size * len(config.search.ladder)
    return {"size": size, "seconds": seconds, "driver_mib": largest(), "driver_grown_mib": largest() - before}
