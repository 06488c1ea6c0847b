"""The main job: prepare, search, publish.

    python -m ray_jobs.pipeline --config configs/demo.yaml

A run of the same name goes on where it stopped: finished stages are skipped. `--fresh` starts over.
"""

import argparse

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.evaluate import evaluators
from ray_jobs.prepare import prepare
from ray_jobs.progress import say
from ray_jobs.publish import publish
from ray_jobs.search import search
from ray_jobs.stage import run_stage


def pipeline(config: Config, arguments: argparse.Namespace) -> None:
    """Run all stages; what they write is listed in the README."""
    run = Storage.open(config.storage).child(config.name)
    if arguments.fresh:
        run.delete("")
    run.write_text("config.yaml", config.to_yaml())
    say("pipeline", f"run {config.name}; results in {run.uri}")
    dataset = prepare(config)
    with evaluators(config, dataset) as pool:
        found = search(config, dataset, pool)
        publish(config, dataset, pool, found)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fresh", action="store_true", help="delete the run's former results first")


if __name__ == "__main__":
    run_stage(__doc__, pipeline, _arguments)
