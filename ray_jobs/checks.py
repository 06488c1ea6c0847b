"""Check a configuration before a run: refuse settings that a later stage cannot carry out.

    python -m ray_jobs.checks --config configs/demo.yaml

Compares image shapes, trained layers, sampling of scores, and serving with the base model's configuration,
without its weights. `cluster.plan` and the stages that train run the same check. It takes about ten seconds.
An error that the user must fix gives one line and exit code 2.
"""

import sys

from ray_jobs.config import ConfigError, add_config_arguments, load_config
from ray_jobs.console import complain, show
from ray_jobs.console.commands import command_parser
from ray_jobs.planning.checks import check_stages
from ray_jobs.planning.packs import checked_pack
from ray_jobs.registry.beginning import with_beginning


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        config = with_beginning(load_config(options.config, options.overrides), kept=False)
        for line in (*check_stages(config), checked_pack(config, [])[1]):
            if line:
                show(line)
    except ConfigError as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
