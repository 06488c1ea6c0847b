"""API keys: made once, kept as hashes, found, expired, revoked; the file whole whatever happens."""

import hashlib
import json
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ray_jobs.config import ConfigError, ServeConfig
from serving.http.api_keys import KeyRing, Scope, add_key, key_file, read_keys, revoke_key
from serving.keys import main

GENERATE: frozenset[Scope] = frozenset({"generate"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def token(path: Path) -> str:
    return add_key(path, "web-shop", GENERATE)


def command(path: Path, *arguments: str) -> int:
    verb, *rest = arguments
    return main([verb, "--keys", str(path), *rest])


def test_a_key_that_was_made_is_found_with_what_it_may(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--name",
        "batch-job",
        "--scope",
        "generate",
        "--scope",
        "feedback",
        "--requests-per-minute",
        "7",
    ]
    assert command(path, "add", *options, "--concurrent-requests", "2", "--days", "1.5") == 0
    (token,) = capsys.readouterr().out.split()
    key = KeyRing(path).find(token)
    assert key is not None and key.expires is not None
    assert (key.name, key.scopes, key.requests_per_minute, key.concurrent_requests) == (
        "batch-job",
        {"generate", "feedback"},
        7,
        2,
    )
    assert key.expires - key.created < timedelta(days=1.5) + timedelta(seconds=5)


def test_the_file_holds_a_digest_and_nothing_of_the_secret(path: Path, token: str) -> None:
    secret = token.rpartition("-")[2]
    assert len(bytes.fromhex(secret)) * 8 == 256
    assert secret not in path.read_text()
    assert read_keys(path).keys[0].sha256 == hashlib.sha256(token.encode()).hexdigest()


def test_only_the_owner_may_read_the_file(path: Path, token: str) -> None:
    os.chmod(path, 0o644)
    add_key(path, "batch-job", GENERATE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(f"{path}.lock").stat().st_mode) == 0o600


@pytest.mark.parametrize("change", ["", "x", "no key", "secret", "id", "upper", "é"])
def test_another_token_finds_nothing(path: Path, token: str, change: str) -> None:
    prefix, id, secret = token.split("-")
    other = {
        "x": token + "x",
        "no key": "Bearer",
        "secret": f"{prefix}-{id}-{secret[:-1]}{'0' if secret[-1] != '0' else '1'}",
        "id": f"{prefix}-{'0' * 8}-{secret}",
        "upper": token.upper(),
    }.get(change, change)
    assert KeyRing(path).find(token) is not None
    assert KeyRing(path).find(other) is None


def test_a_key_ends_when_it_expires(path: Path) -> None:
    expires = datetime(2030, 1, 1, tzinfo=UTC)
    token = add_key(path, "web-shop", GENERATE, expires=expires)
    now = expires.timestamp() - 1
    ring = KeyRing(path, clock=lambda: now)
    assert ring.find(token) is not None
    now += 1
    assert ring.find(token) is None


def test_a_running_server_learns_of_new_and_of_revoked_keys(path: Path, token: str) -> None:
    ring = KeyRing(path)
    second = add_key(path, "batch-job", GENERATE)
    assert ring.find(second) is not None
    revoke_key(path, token.split("-")[1])
    assert ring.find(token) is None and ring.find(second) is not None


def test_a_file_that_breaks_while_the_server_runs_is_logged_once_and_the_last_keys_stay(
    path: Path, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    ring, whole = KeyRing(path), path.read_text()
    with caplog.at_level(logging.ERROR, "diffray.serving"):
        path.write_text(whole[:-20])
        assert ring.find(token) is not None and ring.find(token) is not None
        assert [str(path) in record.getMessage() for record in caplog.records] == [True]
        path.unlink()
        assert ring.find(token) is not None
    path.write_text(whole.replace(token.split("-")[1], "0" * 8))
    assert ring.find(token) is None


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "no such file; make it with python -m serving.keys add"),
        ("{", "Invalid JSON"),
        ('{"keys": [{"id": "00000000"}]}', "keys.0.name: Field required"),
        ('{"keyz": []}', "keyz: Extra inputs"),
    ],
)
def test_a_server_does_not_start_with_a_broken_file(path: Path, content: str | None, says: str) -> None:
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as error:
        KeyRing.of(ServeConfig(keys=str(path)))
    assert str(path) in str(error.value) and says in str(error.value)


def test_two_keys_of_one_id_are_refused(path: Path, token: str) -> None:
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({"keys": tree["keys"] * 2}))
    with pytest.raises(ConfigError, match="the same id"):
        read_keys(path)


def test_a_server_that_nobody_may_ask_is_refused_and_one_for_everybody_is_not() -> None:
    with pytest.raises(ConfigError, match="serve.allow_anonymous"):
        KeyRing.of(ServeConfig())
    assert KeyRing.of(ServeConfig(allow_anonymous=True)) is None


def test_a_relative_file_lies_where_the_other_paths_start(
    path: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFRAY_HOME", str(path.parent))
    assert key_file(ServeConfig(keys=path.name)) == path
    ring = KeyRing.of(ServeConfig(keys=path.name))
    assert ring is not None and ring.find(token) is not None


def test_two_writers_lose_no_key(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(lambda n: add_key(path, f"user {n}", GENERATE), range(40)))
    ring = KeyRing(path)
    assert all(ring.find(token) for token in tokens)
    assert sorted(each.name for each in path.parent.iterdir()) == ["keys.json", "keys.json.lock"]


def test_a_refused_key_leaves_the_file_as_it_was(
    path: Path, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = path.read_text()
    assert command(path, "add", "--name", "a\x1b[2Jb", "--scope", "generate") == 2
    assert command(path, "add", "--name", "c", "--scope", "generate", "--requests-per-minute", "0") == 2
    assert command(path, "add", "--name", "c", "--scope", "generate", "--days", "0") == 2
    assert path.read_text() == before
    out = capsys.readouterr().out
    assert "error: name: " in out and "error: requests_per_minute: " in out and "error: --days 0" in out


def test_the_list_tells_names_and_states_and_no_secret(
    path: Path, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    id, secret = token.split("-")[1:]
    assert command(path, "revoke", id) == 0
    assert command(path, "list") == 0
    out = capsys.readouterr().out
    assert f"{id}  revoked" in out and out.rstrip().endswith("web-shop")
    assert secret not in out
    assert command(path, "revoke", id) == 2, "a second time"
    assert command(path, "revoke", "ffffffff") == 2


def test_the_command_finds_the_file_in_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {
        "name": "demo",
        "data": {"source": "unused"},
        "model": {"base": "unused"},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
    }
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(tree))
    assert main(["list", "--config", str(config)]) == 2
    assert "serve.keys: not set" in capsys.readouterr().out
    config.write_text(json.dumps(tree | {"serve": {"keys": str(tmp_path / "k" / "keys.json")}}))
    assert main(["add", "--config", str(config), "--name", "web-shop", "--scope", "admin"]) == 0
    token = capsys.readouterr().out.strip()
    assert KeyRing(tmp_path / "k" / "keys.json").find(token) is not None
