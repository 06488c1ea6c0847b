"""Score the base model and all checkpoints of a run against held-out pictures.

    python -m ray_jobs.evaluate --config configs/demo.yaml
    python -m ray_jobs.evaluate --config configs/demo.yaml --all

The pictures are the validation split, or with `search.folds` the fold that a training left out. `--all`
computes every score, not only those used for ranking. Only publish uses the test split.
"""

import argparse
from collections.abc import Iterator

from ray_jobs.config import Config
from ray_jobs.console import say
from ray_jobs.data.preparation import prepare
from ray_jobs.evaluation.cross_validation import splits
from ray_jobs.evaluation.pool import evaluators
from ray_jobs.evaluation.scores import describe_record
from ray_jobs.planning.settled import settled
from ray_jobs.run.command_line import run_stage
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.signs import black_line
from ray_jobs.run.split import Split, unseen_by
from ray_jobs.training.checkpoint import find_rungs
from ray_jobs.weights.feature_networks import check_networks


def evaluate(config: Config, arguments: argparse.Namespace) -> None:
    """Run the stage."""
    config = settled(config)
    check_networks(config.evaluate)
    dataset = prepare(config)
    with evaluators(config, dataset) as pool:
        for name, weights, split in _candidates(config):
            if split is None:
                say("evaluate", f"{name}: skipped: only the test split is unseen, and only publish uses it")
                continue
            pool.load(split)
            measured = pool.measure(weights, split) if arguments.all else None
            found = measured.scores if measured else pool.score(weights, split)
            of = f" ({found.fid.num_samples} pictures, {found.fid.feature_network})" if not weights else ""
            say("evaluate", f"{name}: {found.described()}{of}")
            count = found.fid.num_samples
            if line := black_line(name, found.black, count, config.evaluate.precision):
                say("evaluate", line)
            for record in measured.records() if measured else ():
                say("evaluate", f"{name}: {describe_record(record)}")
            for sentence in measured.left_out if measured and not weights else ():
                say("evaluate", sentence)


def _candidates(config: Config) -> Iterator[tuple[str, str | None, Split | None]]:
    """Yield (name, weights, unseen split) for the base model and every checkpoint of the run."""
    for split in splits(config):
        yield f"base, {split}" if config.search.folds else "base", None, split
    for training, rungs in find_rungs(RunFolder.of(config).trainings).items():
        for rung in rungs:
            yield f"{training}  step {rung.step}", rung.weights, unseen_by(training)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="compute every score, as publish does")


def main(given: list[str] | None = None) -> None:
    run_stage(__doc__, evaluate, _arguments, name="evaluate", given=given)


if __name__ == "__main__":
    main()
