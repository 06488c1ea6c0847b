"""Plan a run on a cluster before anything is started: placement, memory, batches, cost.

    python -m cluster.plan --config configs/demo.yaml
    python -m cluster.plan --config big.yaml --nodes 4x8gpu80
    python -m cluster.plan --config big.yaml --nodes shape.yaml --images-per-second 900
    python -m cluster.plan --config big.yaml --address 10.0.0.5:6379

`--nodes 4x8gpu80` means four machines with eight GPUs of 80 GiB each; a YAML file lists `{count, cpus, gpus,
gpu_gib, memory_gib}`. The default is this machine's embedded Ray. No weights are loaded: sizes come from the
headers of the model's files. The exit code is 0 if everything fits, 1 if something does not, and 2 for an
error that the user must fix, including one that a later stage would meet (`ray_jobs/checks.py`).
"""

import sys

from cluster.shape import Machine, embedded, machines_of, parse_nodes
from ray_jobs.config import Config, ConfigError, add_config_arguments, load_config
from ray_jobs.console.commands import command_parser
from ray_jobs.planning.plan import plan
from ray_jobs.registry.beginning import with_beginning


def live(address: str, config: Config) -> list[Machine]:
    """Return the nodes of a running cluster, and the memory of their GPUs if the configuration uses any."""
    from cluster.connect import joined
    from cluster.nodes import living_nodes
    from cluster.preflight import equipment

    with joined(address):
        nodes = living_nodes()
        on_gpus = any(each.use_gpu for each in (config.train, config.evaluate, config.serve))
        return machines_of(nodes, equipment(nodes) if on_gpus else None)


def _suited(config: Config) -> tuple[Config, list[str]]:
    """Return the configuration as its sources decide it, and a line if they cannot be read from here."""
    from ray_jobs.data.subjects import suited_to_subjects

    try:
        return suited_to_subjects(config), []
    except ConfigError as error:
        return config, [f"planned without the sources, which decide on folds of subjects: {error}"]


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        "--nodes", help="machines, as 4x8gpu80 or 3x16cpu64, several separated by commas; or a YAML file"
    )
    shape.add_argument("--address", help="GCS address of a running cluster, as head:6379")
    parser.add_argument("--images-per-second", type=float, help="speed of one trial, measured in a run")
    options = parser.parse_args(arguments)
    try:
        config = with_beginning(load_config(options.config, options.overrides), kept=False)
        if options.address:
            machines = live(options.address, config)
        else:
            machines = parse_nodes(options.nodes) if options.nodes else embedded(config.local)
        config, unread = _suited(config)
        page, fits = plan(config, machines, options.images_per_second)
        from ray_jobs.planning.checks import check_stages  # imports Ray

        warnings = check_stages(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([page, *unread, *warnings]))
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
