"""API keys: the file that stores them, and the lookup of a request's key.

A key is `diffray-<id>-<secret>`. It is shown once, when it is created; the file (`serve.keys`, or
`--keys FILE`) stores its SHA-256. One round of a plain hash is right here, though wrong for passwords: slow,
salted hashes protect secrets that people choose and that can be guessed. A secret of 256 random bits cannot
be guessed, however fast its hash is, and a slow hash would only let strangers keep the server busy. The id is
not secret: it selects the entry, appears in logs, and names the key for `revoke`. Digests are compared in
constant time, so that response times reveal nothing about them.
"""

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints, ValidationError, model_validator

from ray_jobs.config import ConfigError, Section, ServeConfig, home
from ray_jobs.config.fields import Positive
from serving.http.logs import LOGGER

TOKEN = re.compile(r"diffray-([0-9a-f]{8})-[0-9a-f]{64}")

Scope = Literal["generate", "feedback", "admin"]


class Key(Section):
    """A stored key; times have a time zone."""

    id: str = Field(pattern=r"^[0-9a-f]{8}$", description="in logs, and for revoke")
    # One line of visible characters, because it is printed.
    name: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$", max_length=100)]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the whole key, in hexadecimal")
    scopes: frozenset[Scope] = Field(min_length=1)
    requests_per_minute: Positive | None = Field(None, description="null: serve.requests_per_minute")
    concurrent_requests: Positive | None = Field(None, description="null: serve.concurrent_requests")
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    def state(self, now: datetime) -> Literal["valid", "expired", "revoked"]:
        """Return the key's state at time `now`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "valid"


class KeyFile(Section):
    """Content of the key file."""

    keys: list[Key] = []

    @model_validator(mode="after")
    def _distinct(self) -> "KeyFile":
        if len({key.id for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same id")
        return self


def key_file(settings: ServeConfig) -> Path | None:
    """Return the absolute path of `serve.keys`, relative to `home()`; None if it is not set."""
    return None if settings.keys is None else home() / Path(settings.keys).expanduser()


def read_keys(path: Path) -> KeyFile:
    """Read the keys of a file.

    Raises:
        ConfigError: the file is missing, unreadable or invalid; names the file.
    """
    try:
        return KeyFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"serve.keys: {path}: no such file; make it with {_add_command(path)}") from None
    except OSError as error:
        raise ConfigError(f"serve.keys: {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "file"
        # Without the value, which may be a secret pasted by mistake.
        raise ConfigError(f"serve.keys: {path}: {field}: {first['msg']}; restore the file") from None


def _add_command(path: Path) -> str:
    return f"python -m serving.keys add --keys {path} --name NAME --scope generate"


@contextmanager
def _rewritten(path: Path, *, create: bool = False) -> Iterator[list[Key]]:
    """Yield the keys, to be changed in place; write them if the block ends without an error.

    Readers see the old file or the new one, never a partial one. Writers lock each other out by a file beside
    it, because the file itself is replaced.
    """
    path = path.resolve()  # a symbolic link stays one
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.exists():
        read_keys(path)
    with open(os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR, 0o600), "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = read_keys(path).keys if path.exists() or not create else []
        yield keys
        text = json.dumps(KeyFile(keys=keys).model_dump(mode="json"), indent=2) + "\n"
        descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 600
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise


def add_key(
    path: Path,
    name: str,
    scopes: frozenset[Scope],
    *,
    requests_per_minute: int | None = None,
    concurrent_requests: int | None = None,
    expires: datetime | None = None,
) -> str:
    """Create a key and return its token, which is not stored. The file is created if it is missing.

    Raises:
        ConfigError: the file is broken, or an argument is invalid.
    """
    with _rewritten(path, create=True) as keys:
        taken = {key.id for key in keys}
        id = next(id for id in iter(lambda: secrets.token_hex(4), None) if id not in taken)
        token = f"diffray-{id}-{secrets.token_hex(32)}"
        try:
            key = Key(
                id=id,
                name=name,
                sha256=digest(token),
                scopes=scopes,
                requests_per_minute=requests_per_minute,
                concurrent_requests=concurrent_requests,
                created=datetime.now(UTC),
                expires=expires,
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        keys.append(key)
    return token


def revoke_key(path: Path, id: str) -> None:
    """Revoke a key; a running server refuses it from the next request on.

    Raises:
        ConfigError: there is no such key, or it is already revoked.
    """
    with _rewritten(path) as keys:
        places = [place for place, key in enumerate(keys) if key.id == id]
        if not places:
            raise ConfigError(f"{id}: no such key in {path}; list shows them")
        key = keys[places[0]]
        if key.revoked is not None:
            raise ConfigError(f"{id}: revoked already, {key.revoked:%Y-%m-%d}")
        keys[places[0]] = key.model_copy(update={"revoked": datetime.now(UTC)})


def digest(token: str) -> str:
    """Return the SHA-256 of a key in hexadecimal."""
    return hashlib.sha256(token.encode()).hexdigest()


class KeyRing:
    """Keys of a file, which is read again whenever it has changed.

    If the file becomes invalid while the server runs, this is logged, and the last valid keys stay.

    Args:
        path: path of the key file.
        clock: clock in seconds since 1970.

    Raises:
        ConfigError: the file cannot be read at the start; names the file.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._seen = self._stamp()
        self._keys = {key.id: key for key in read_keys(path).keys}

    @staticmethod
    def of(settings: ServeConfig) -> "KeyRing | None":
        """Return the key ring of `serve.keys`; None if there are no keys and anonymous requests are allowed.

        Raises:
            ConfigError: the file is broken, or neither keys nor anonymous requests are configured.
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
        """Return the key of a token; None if it is unknown, expired or revoked."""
        self._refresh()
        match = TOKEN.fullmatch(token)
        key = self._keys.get(match[1]) if match else None
        if key is None or not hmac.compare_digest(key.sha256, digest(token)):
            return None
        return key if key.state(datetime.fromtimestamp(self._clock(), UTC)) == "valid" else None

    def _stamp(self) -> tuple[int, ...] | None:
        """Return a fingerprint that changes with the file; None if there is no file."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _refresh(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp  # set before reading: a change in between is noticed next time
        try:
            self._keys = {key.id: key for key in read_keys(self._path).keys}
        except ConfigError as error:
            LOGGER.error("%s; the keys that were read last stay", error)
        else:
            LOGGER.info("serve.keys: %s: %d keys", self._path, len(self._keys))
