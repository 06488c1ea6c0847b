"""Manage the endpoint's API keys.

    python -m serving.keys add --config configs/demo.yaml --name alice --scope generate
    python -m serving.keys list --config configs/demo.yaml
    python -m serving.keys revoke --config configs/demo.yaml 3f9a01c2

A key is shown once, when it is created; the file keeps its SHA-256 (`serving.http.api_keys`).
"""

import argparse
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

from ray_jobs.config import ConfigError, load_config
from ray_jobs.console import complain, show
from ray_jobs.console.commands import command_parser
from serving.http.api_keys import Scope, add_key, key_file, read_keys, revoke_key


def _path_of(options: argparse.Namespace) -> Path:
    if options.keys is not None:
        return Path(options.keys).expanduser()
    path = key_file(load_config(options.config).serve)
    if path is None:
        raise ConfigError(f"{options.config}: serve.keys: not set; name a file there, or give --keys FILE")
    return path


def _list(path: Path) -> None:
    now, row = datetime.now(UTC), "{:<8}  {:<7}  {:<10}  {:<10}  {:<23}  {}"
    show(row.format("id", "state", "created", "expires", "scopes", "name"))
    for key in read_keys(path).keys:
        expires = f"{key.expires:%Y-%m-%d}" if key.expires else "never"
        scopes = ",".join(sorted(key.scopes))
        show(row.format(key.id, key.state(now), f"{key.created:%Y-%m-%d}", expires, scopes, key.name))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    where = argparse.ArgumentParser(add_help=False)
    file = where.add_mutually_exclusive_group(required=True)
    file.add_argument(
        "--config", help="YAML file, or the name of a recipe; its serve.keys is the file of keys"
    )
    file.add_argument("--keys", metavar="FILE", help="the file of keys")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", parents=[where], help="make a key and show it, once")
    add.add_argument("--name", required=True, help="whose it is")
    add.add_argument("--scope", action="append", required=True, choices=get_args(Scope))
    add.add_argument("--days", type=float, help="until it expires; without, never")
    add.add_argument("--requests-per-minute", type=int, metavar="N", help="its own limit")
    add.add_argument("--concurrent-requests", type=int, metavar="N", help="its own limit")
    commands.add_parser("list", parents=[where], help="ids, states, scopes and names")
    commands.add_parser("revoke", parents=[where], help="refuse a key from now on").add_argument("id")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code: 2 for a configuration error."""
    options = _parser().parse_args(arguments)
    try:
        path = _path_of(options)
        if options.command == "add":
            if options.days is not None and not 0 < options.days < 100_000:
                raise ConfigError(f"--days {options.days:g}: must be above 0 and below 100000")
            days = options.days and timedelta(days=options.days)
            token = add_key(
                path,
                options.name,
                frozenset(options.scope),
                requests_per_minute=options.requests_per_minute,
                concurrent_requests=options.concurrent_requests,
                expires=datetime.now(UTC) + days if days else None,
            )
            show(token)
            print("Keep it: it is shown this once.", file=sys.stderr)
        elif options.command == "revoke":
            revoke_key(path, options.id)
            show(f"{options.id}: revoked")
        else:
            _list(path)
    except ConfigError as error:
        return complain(error)
    except OSError as error:
        show(f"error: {error.filename}: {error.strerror}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
