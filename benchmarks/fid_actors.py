"""What a score costs beside its networks, and what a second evaluator brings.

    python -m benchmarks.fid_actors

One score of the demo's base model: pictures sampled, features taken, Fréchet distances with their errors.
Aims: at most 5 % of the time outside the networks (denoiser, text encoder, decoder, feature networks), and
1.8 times the pictures a second with two evaluators, each of one thread. One and two evaluators take turns.
Results go to benchmarks/results/fid_actors.json.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import ray

from benchmarks.fid import Clock
from cluster.connect import connect
from ray_jobs.config import Config, load_config
from ray_jobs.console import quiet_logs, show
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.preparation import prepare
from ray_jobs.evaluation.actor import Evaluator
from ray_jobs.evaluation.pool import EvaluatorPool, evaluators
from ray_jobs.evaluation.scores import Real
from ray_jobs.run.split import VALIDATION

RESULTS = Path(__file__).parent / "results" / "fid_actors.json"


def outside_networks(config: Config, dataset: Dataset) -> dict[str, float]:
    """Where the seconds of one score go, in this process on one thread; the second of two scores."""
    evaluator, clock = Evaluator(config, dataset, 1), Clock()
    pipeline: Any = evaluator.base
    networks = evaluator.networks
    for part, name in ((pipeline.unet, "denoiser"), (pipeline.text_encoder, "text encoder")):
        part.forward = clock.timed(name, part.forward)
    pipeline.vae.decode = clock.timed("decoder", pipeline.vae.decode)
    timed = [
        replace(each, module=clock.timed("feature networks", each.module))  # type: ignore[call-arg, attr-defined]
        for each in networks.ranking
    ]
    evaluator.networks = replace(networks, first=timed[0], second=timed[1] if timed[1:] else None)

    rows = dataset.pictures(VALIDATION.name, config.evaluate.num_samples)
    real = Real.of(evaluator.picture_features([row["image"] for row in rows]))
    captions = [row["text"] for row in rows]
    for _ in range(2):
        clock.spent.clear()
        begin = time.perf_counter()
        features = evaluator.sample_features(None, captions, list(range(len(captions))))
        evaluator.score(real, None, None, features)
        whole = time.perf_counter() - begin
    spent = {name: sum(times) for name, times in clock.spent.items()}
    return {"pictures": len(captions), "seconds": whole, **spent, "outside": 1 - sum(spent.values()) / whole}


def with_actors(config: Config, dataset: Dataset, rounds: int) -> dict[str, Any]:
    """Seconds a score of one and of two evaluators, in turns."""

    def of(count: int) -> Config:
        return config.model_copy(
            update={"evaluate": config.evaluate.model_copy(update={"num_actors": count})}
        )

    spent: dict[int, list[float]] = {1: [], 2: []}
    with evaluators(of(1), dataset) as one, evaluators(of(2), dataset) as two:
        pools: dict[int, EvaluatorPool] = {1: one, 2: two}
        scores = {}
        for pool in pools.values():
            pool.load(VALIDATION)
            pool.score(None, VALIDATION)  # the first one fills caches
        for _ in range(rounds):
            for count, pool in pools.items():
                begin = time.perf_counter()
                scores[count] = pool.score(None, VALIDATION).fid
                spent[count].append(time.perf_counter() - begin)
    values = [scores[count].value for count in (1, 2)]
    return {
        "pictures": scores[1].num_samples,
        "seconds": spent,
        "ratio": median(spent[1]) / median(spent[2]),
        "relative_difference": abs(values[1] / values[0] - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet_logs()
    config = load_config(arguments.config, ["name=bench-fid", *arguments.overrides])
    with connect(config):
        dataset = prepare(config)
        # In a process of its own: this one is the driver.
        alone = ray.get(ray.remote(num_cpus=1)(outside_networks).remote(config, dataset))
        actors = with_actors(config, dataset, arguments.rounds)
    found = {"one_score": alone, "actors": actors, "cores": len(os.sched_getaffinity(0))}
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    show(f"{alone['outside']:.1%} of a score's time outside the networks (aim: at most 5 %)")
    show(
        f"two evaluators: {actors['ratio']:.2f} times the pictures a second (aim: 1.8); the same FID but for "
        f"{actors['relative_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
