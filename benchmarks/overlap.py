"""What measuring the rungs costs their training: the same climb with evaluation beside it, and without.

    python -m benchmarks.overlap                    # one worker and one evaluator: a core each

A worker writes a checkpoint at each rung and trains on while an evaluator samples and scores it. Compared are
the seconds from the first step to the last, and how much of them the trainer idled: the gap after each rung
beyond the climb's median step. Beside them, the same rungs measured in line, after the training: what people
pay whose loop stops to evaluate. Results go to benchmarks/results/overlap.json.
"""

import argparse
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cluster.connect import connect
from cluster.storage import Storage
from ray_jobs.config import Config, load_config
from ray_jobs.console import quiet_logs, show
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.preparation import prepare
from ray_jobs.evaluation.pool import EvaluatorPool, evaluators
from ray_jobs.run.split import VALIDATION
from ray_jobs.search import search
from ray_jobs.training.checkpoint import SERIES, find_rungs, folder_of, steps_of
from ray_jobs.training.trainer import build_trainer, training_name

RESULTS = Path(__file__).parent / "results" / "overlap.json"
OVERRIDES = [
    "name=bench-overlap",
    "train.num_workers=1",
    "train.learning_rate=1.0e-3",
    "search.learning_rates=[1.0e-3]",
    "search.ladder=[40,80,120,160]",
    "search.scheduler=none",
    "evaluate.num_actors=1",
]


def times_of(config: Config, name: str) -> dict[int, float]:
    """When each step of a training ended, in seconds since 1970."""
    trial = Storage.open(config.storage).child(config.name, "train", name)
    rows = [
        row for step in steps_of(trial) for row in json.loads(trial.child(folder_of(step)).read_text(SERIES))
    ]
    return {row["step"]: row["time"] for row in rows}


def told(times: dict[int, float], ladder: list[int]) -> dict[str, float]:
    """Seconds of a climb, of its median step, and idle after its rungs but the last."""
    steps = [times[step] for step in sorted(times)]
    usual = median(later - earlier for earlier, later in pairwise(steps))
    gaps = [max(0.0, times[rung + 1] - times[rung] - usual) for rung in ladder[:-1]]
    return {"seconds": steps[-1] - steps[0], "median_step": usual, "idle": sum(gaps)}


def in_line(config: Config, pool: EvaluatorPool, name: str) -> float:
    """Seconds to measure the rungs but the last, one after the other, while nothing trains."""
    trainings = Storage.open(config.storage).child(config.name, "train")
    begin = time.perf_counter()
    for rung in find_rungs(trainings)[name][:-1]:
        pool.score(rung.weights, VALIDATION)
        pool.validation_losses(rung.weights)
    return time.perf_counter() - begin


def measured(config: Config, dataset: Dataset) -> dict[str, Any]:
    ladder = config.search.ladder
    build_trainer(config, dataset, name="alone").fit()
    with evaluators(config, dataset) as pool:
        pool.load(VALIDATION)
        pool.score(None, VALIDATION)  # the first one compiles and fills caches
        search(config, dataset, pool)
        waiting = in_line(config, pool, training_name(config))
    alone, beside = (told(times_of(config, name), ladder) for name in ("alone", training_name(config)))
    return {
        "alone": alone,
        "beside": beside,
        "measuring_in_line": waiting,
        "seconds_ratio": beside["seconds"] / alone["seconds"],
        "in_line_ratio": (alone["seconds"] + waiting) / alone["seconds"],
        "idle_share": {
            "alone": alone["idle"] / alone["seconds"],
            "beside": beside["idle"] / beside["seconds"],
        },
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet_logs()
    config = load_config(arguments.config, [*OVERRIDES, *arguments.overrides])
    with connect(config):
        found = measured(config, prepare(config))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    idle = found["idle_share"]
    show(f"evaluation beside it: {found['seconds_ratio']:.2f} of the time alone, idle after the rungs")
    show(f"{idle['beside']:.1%} of it (alone {idle['alone']:.1%}); in line: {found['in_line_ratio']:.2f}")


if __name__ == "__main__":
    main()
