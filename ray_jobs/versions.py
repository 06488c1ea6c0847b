"""List the versions of the registry, promote one by hand, or roll back a promotion.

    python -m ray_jobs.versions status --config configs/demo.yaml
    python -m ray_jobs.versions promote --config configs/demo.yaml --version 3
    python -m ray_jobs.versions rollback --config configs/demo.yaml

A new version is the `candidate`. It becomes the `champion`, which is served, if its test score (the one that
ranked its search, or FID if the champion lacks that) is lower than the champion's by more than the error of
the difference, on the same test split. The first version of a name must beat the base model instead. The
former champion becomes `previous`. Each command can be repeated after an interruption.
"""

import argparse
import sys

from ray_jobs.config import ConfigError, add_config_arguments, load_config
from ray_jobs.console import complain, show
from ray_jobs.console.commands import command_parser
from ray_jobs.registry.aliases import command_line, promote, rollback, status


def _run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    name = config.publish.model_name
    if arguments.command == "status":
        show(status(config))
    elif arguments.command == "promote":
        promote(config, arguments.version)
        show(
            f"version {arguments.version} is the champion of {name!r}; to undo it: {command_line('rollback')}"
        )
    else:
        show(f"version {rollback(config)} is the champion of {name!r} again")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code, 2 for an error that the user must fix."""
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, purpose in (
        ("status", "list the versions with their aliases and scores"),
        ("promote", "make a version the champion, whatever its scores"),
        ("rollback", "make the previous version the champion again"),
    ):
        options = commands.add_parser(command, help=purpose, description=purpose)
        add_config_arguments(options)
        if command == "promote":
            options.add_argument(
                "--version", type=int, required=True, help="a version number, as listed by status"
            )
    try:
        _run(parser.parse_args(argv))
    except ConfigError as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
