"""Versions of the registry: list them, promote one by hand, roll back a promotion.

    python -m ray_jobs.versions status --config configs/demo.yaml
    python -m ray_jobs.versions promote --config configs/demo.yaml --version 3
    python -m ray_jobs.versions rollback --config configs/demo.yaml

A new version is the `candidate`. It becomes the `champion`, which is served, if its test FID beats the
champion's by more than the error of the difference, both being measured alike on the same test split, and the
first of its name if it beats the base model's; the former champion becomes `previous`.
All of this can be done again after an interruption, and done twice it changes nothing more.
"""

import argparse
import sys

from ray_jobs.config import ConfigError, add_config_arguments, load_config
from ray_jobs.console import complain, show
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
    parser = argparse.ArgumentParser(
        prog="python -m ray_jobs.versions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, purpose in (
        ("status", "the versions, their aliases and scores"),
        ("promote", "make a version the champion, whatever its scores"),
        ("rollback", "make the previous version the champion again"),
    ):
        options = commands.add_parser(command, help=purpose, description=purpose)
        add_config_arguments(options)
        if command == "promote":
            options.add_argument("--version", type=int, required=True, help="a number that status lists")
    try:
        _run(parser.parse_args(argv))
    except ConfigError as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
