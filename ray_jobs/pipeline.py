"""Run all stages: prepare, search, publish.

    python -m ray_jobs.pipeline --config configs/demo.yaml

A run of the same name resumes: finished stages are skipped. `--fresh` starts over.
"""

import argparse

from cluster.fetched import local_path
from cluster.lease import LEASES
from ray_jobs.config import Config, ConfigError, add_budget_arguments
from ray_jobs.console import phase, say
from ray_jobs.data.encoding.class_pictures import announce_class_pictures
from ray_jobs.data.preparation import open_sources, prepare
from ray_jobs.evaluation.pool import evaluators
from ray_jobs.planning.checks import checked
from ray_jobs.planning.settled import settled
from ray_jobs.publish import publish
from ray_jobs.publishing.remembered import require_remembered
from ray_jobs.registry.models import check_store
from ray_jobs.run.command_line import run_stage
from ray_jobs.run.folder import BEGINS_FROM, CONFIG, RunFolder
from ray_jobs.search import search
from ray_jobs.weights.feature_networks import check_networks
from ray_jobs.weights.model_files import check_weights


def pipeline(config: Config, arguments: argparse.Namespace) -> None:
    """Run all stages; the README lists their outputs."""
    phase("checks")
    config = settled(config, anew=arguments.fresh)
    check_inputs(config)
    run = RunFolder.of(config).root
    if arguments.fresh:
        for name in {*run.folders(), *run.files()} - {LEASES, BEGINS_FROM}:
            run.delete(name)
    run.write_text(CONFIG, config.to_yaml())
    say("pipeline", f"run {config.name}; results in {run.uri}")
    check = checked(config)
    dataset = prepare(config, check=check)
    rows = dataset.rows_an_epoch
    if (resolved := config.with_ladder(rows)) is not config:
        config = resolved
        run.write_text(CONFIG, config.to_yaml())
    with evaluators(config, dataset) as pool:
        # Only the search goes by what the cluster decides: a version has the digest of what is written above.
        found = search(check().with_ladder(rows), dataset, pool)
        publish(config, dataset, pool, found)


def check_inputs(config: Config) -> None:
    """Check the inputs of all stages (files, model, MLflow), so that a wrong name costs seconds and no GPU.

    Raises:
        ConfigError: an input is missing or invalid; the message names the field.
    """
    check_store(config)
    announce_class_pictures(config, open_sources(config))
    check_networks(config.evaluate)
    require_remembered(config)
    try:
        check_weights(local_path(config.model.base), revision=config.model.revision)
    except ValueError as error:
        raise ConfigError(f"model.base: {error}") from None


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_budget_arguments(parser)
    parser.add_argument("--fresh", action="store_true", help="delete the run's previous results first")


def main(given: list[str] | None = None) -> None:
    run_stage(__doc__, pipeline, _arguments, given=given)


if __name__ == "__main__":
    main()
