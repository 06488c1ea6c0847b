"""API keys: who may ask for what.

    python -m serving.keys add --config configs/demo.yaml --name alice --scope generate
    python -m serving.keys list --config configs/demo.yaml
    python -m serving.keys revoke --config configs/demo.yaml 3f9a01c2

A key is `diffray-<id>-<secret>`. It is shown once, when it is made; the file (`serve.keys`, or `--keys FILE`)
keeps the SHA-256 of it. One round of a plain hash is right here, where for passwords it would be wrong: slow
and salted hashes protect what people choose, which can be guessed, while a secret of 256 random bits cannot
be, however fast its hash is, and a slow one would only let strangers keep the server busy. The id is no
secret: it finds the entry, stands in logs, and names the key to `revoke`; the digests are then compared in
constant time, so that answers tell nothing about them by how long they take.
"""

import argparse
import hmac
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

from ray_jobs.config import ConfigError, ServeConfig, load_config
from ray_jobs.progress import complain, show
from serving.key_file import Key, Scope, add_key, digest, key_file, read_keys, revoke_key
from serving.logs import LOGGER

TOKEN = re.compile(r"diffray-([0-9a-f]{8})-[0-9a-f]{64}")


class KeyRing:
    """The keys of a file, read again whenever it has changed.

    A file that breaks while the server runs is logged, and the keys that were read last stay.

    Args:
        path: of the file.
        clock: seconds since 1970.

    Raises:
        ConfigError: naming the file, if it cannot be read now.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._seen = self._stamp()
        self._keys = {key.id: key for key in read_keys(path).keys}

    @staticmethod
    def of(settings: ServeConfig) -> "KeyRing | None":
        """The ring of `serve.keys`; None where there are no keys and everybody may ask.

        Raises:
            ConfigError: the file is broken, or nobody could ask.
        """
        path = key_file(settings)
        if path is not None:
            return KeyRing(path)
        if not settings.allow_anonymous:
            raise ConfigError(
                "serve.keys: nobody may ask this server; name a file of keys and make one with "
                "`python -m serving.keys add`, or answer everybody with serve.allow_anonymous: true"
            )
        return None

    def find(self, token: str) -> Key | None:
        """The key of a token; None if it is unknown, expired or revoked."""
        self._refresh()
        match = TOKEN.fullmatch(token)
        key = self._keys.get(match[1]) if match else None
        if key is None or not hmac.compare_digest(key.sha256, digest(token)):
            return None
        return key if key.state(datetime.fromtimestamp(self._clock(), UTC)) == "valid" else None

    def _stamp(self) -> tuple[int, ...] | None:
        """Differs when the file does; None if there is none."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _refresh(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp  # before reading: a change in between is seen the next time
        try:
            self._keys = {key.id: key for key in read_keys(self._path).keys}
        except ConfigError as error:
            LOGGER.error("%s; the keys that were read last stay", error)
        else:
            LOGGER.info("serve.keys: %s: %d keys", self._path, len(self._keys))


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
    parser = argparse.ArgumentParser(prog="python -m serving.keys", description="API keys of the endpoint.")
    where = argparse.ArgumentParser(add_help=False)
    file = where.add_mutually_exclusive_group(required=True)
    file.add_argument("--config", help="YAML file; its serve.keys is the file of keys")
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
    """The command line; returns the exit code: 2 for what the user must mend."""
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
