"""The MLflow store: names that are no filter's words, all pages, deleted experiments, writes at once."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from ray_jobs.config import Config, ConfigError
from ray_jobs.registry.models import (
    check_store,
    not_ours,
    nothing_published,
    open_client,
    open_existing,
    tracking_uri,
)
from ray_jobs.registry.store import ATTEMPTS, experiment_id, pages, retried, versions_of
from ray_jobs.training.tracking import opened_store


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def configured(storage: Path, name: str, **publish: Any) -> Config:
    return Config.model_validate(
        {
            "name": name,
            "storage": str(storage),
            "data": {"source": "unused"},
            "model": {"base": "unused"},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
            "publish": publish,
        }
    )


@pytest.fixture(scope="module")
def client(storage: Path) -> Any:
    return open_client(configured(storage, "any"))


def test_the_relative_url_of_a_store_is_no_file_in_the_copy_that_a_job_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, copy, url = tmp_path / "home", tmp_path / "copy", "sqlite:///runs/mlflow.db"
    copy.mkdir()
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DIFFRAY_HOME", str(home))
    config = configured(home / "runs", "a-run", tracking_uri=url)
    open_client(config).create_registered_model("kept")
    assert (home / "runs" / "mlflow.db").exists() and not list(copy.iterdir())
    assert [each.name for each in open_existing(config).search_registered_models()] == ["kept"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    assert tracking_uri(configured(home, "a-run")) == tracking_uri(config)


def test_every_page_is_read(client: Any) -> None:
    client.create_registered_model("many")
    for _ in range(5):
        client.create_model_version("many", source="nowhere")
    found = list(pages(client.search_model_versions, filter_string="name = 'many'", max_results=2))
    assert sorted(int(each.version) for each in found) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["it's", 'a "b"', """it's "b\"""", "a%b", "back\\slash", "x' OR name != 'x"])
def test_versions_of_a_name_are_found_whatever_it_is(client: Any, name: str) -> None:
    client.create_registered_model(name)
    client.create_registered_model(f"{name} 2")
    for each in (name, f"{name} 2", name):
        client.create_model_version(each, source="nowhere")
    assert {(each.name, int(each.version)) for each in versions_of(client, name)} == {(name, 1), (name, 2)}


def test_a_deleted_experiment_is_told_before_the_start_and_with_the_commands(
    storage: Path, client: Any
) -> None:
    config = configured(storage, "tidied-up")
    check_store(config)
    with opened_store(config):
        pass
    check_store(config)
    identity = client.get_experiment_by_name("tidied-up").experiment_id
    client.delete_experiment(identity)
    expected = (
        rf"name: the MLflow experiment 'tidied-up' was deleted; .*restore --experiment-id {identity}.*"
        rf"mlflow gc --experiment-ids {identity}"
    )
    with pytest.raises(ConfigError, match=expected) as caught:
        check_store(config)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=expected):
        experiment_id(client, "tidied-up")
    check_store(configured(storage, "another"))
    assert experiment_id(client, "tidied-up", restore=True) == identity
    check_store(config)


def test_runs_that_start_at_once_share_one_experiment(storage: Path, client: Any) -> None:
    together, found = threading.Barrier(3), list[str]()

    def start() -> None:
        together.wait()
        found.append(experiment_id(client, "at-once"))

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1


def failing(times: int, message: str, code: int) -> Any:
    """A write that fails so often, and how often it was called."""
    calls: list[int] = []

    def write() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise MlflowException(message, error_code=code)
        return "written"

    return write, calls


def test_a_write_is_tried_again_where_another_came_between_and_not_for_other_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow.protos.databricks_pb2 import BAD_REQUEST, INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

    monkeypatch.setattr("ray_jobs.registry.store.PAUSE_S", 0.0001)
    unique = "(sqlite3.IntegrityError) UNIQUE constraint failed: registered_model_aliases.name"
    for message, code in ((unique, BAD_REQUEST), ("database is locked", TEMPORARILY_UNAVAILABLE)):
        write, calls = failing(3, message, code)
        assert retried(write) == "written" and len(calls) == 4
        write, calls = failing(100, message, code)
        with pytest.raises(MlflowException):
            retried(write)
        assert len(calls) == ATTEMPTS
    write, calls = failing(1, "Invalid model name", INVALID_PARAMETER_VALUE)
    with pytest.raises(MlflowException):
        retried(write)
    assert len(calls) == 1


@contextmanager
def answering(status: int, body: bytes, **headers: str) -> Iterator[tuple[str, list[str]]]:
    """The address of a server that always answers so, and the paths that it was asked for."""
    asked: list[str] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_a_server_is_asked_for_the_experiment_by_a_name_that_is_not_pasted(storage: Path) -> None:
    deleted = b'{"experiment": {"experiment_id": "7", "lifecycle_stage": "deleted"}}'
    told = pytest.raises(ConfigError, match="was deleted; .*--experiment-id 7")
    with answering(200, deleted) as (uri, asked), told:
        check_store(configured(storage, "a-run", tracking_uri=uri))
    assert asked == ["/api/2.0/mlflow/experiments/get-by-name?experiment_name=a-run"]
    for status in (401, 404):
        with answering(status, b"{}") as (uri, _):
            check_store(configured(storage, "a-run", tracking_uri=uri))


def test_what_is_no_mlflow_server_is_told(storage: Path) -> None:
    with answering(200, b"<html>") as (uri, _), pytest.raises(ConfigError, match="is no MLflow server"):
        check_store(configured(storage, "a-run", tracking_uri=uri))


def test_a_file_that_is_no_database_is_told_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database" * 100)
    config = configured(tmp_path, "a-run")
    with pytest.raises(ConfigError, match=r"publish.tracking_uri: sqlite:.*not a database"):
        check_store(config)


def test_an_address_is_told_without_its_password(tmp_path: Path) -> None:
    config = configured(tmp_path, "a", tracking_uri="postgresql://me:secret@127.0.0.1:1/mlflow")
    with pytest.raises(ConfigError, match="publish.tracking_uri: postgresql://me:") as caught:
        check_store(config)
    assert "secret" not in str(caught.value) and tracking_uri(config) == config.publish.tracking_uri


@pytest.mark.parametrize("uri", ["http://me:secret@127.0.0.1:1", "http://me:secret@127.0.0.1:none"])
def test_no_password_of_a_server_is_told(tmp_path: Path, uri: str) -> None:
    config = configured(tmp_path, "a", tracking_uri=uri)
    with pytest.raises(ConfigError, match=r"publish.tracking_uri: http://.*@127") as caught:
        check_store(config)
    for error in (caught.value, nothing_published(config), not_ours(config, 1)):
        assert "secret" not in str(error) and "127.0.0.1" in str(error)


def test_a_server_behind_a_login_is_left_to_mlflow(storage: Path) -> None:
    """A redirection to a page where one logs in is followed by no one without credentials."""
    with answering(302, b"<html>", Location="/login") as (uri, asked):
        check_store(configured(storage, "a-run", tracking_uri=uri))
    assert len(asked) == 1


def test_looking_makes_no_database(tmp_path: Path) -> None:
    check_store(configured(tmp_path, "a-run"))
    assert not list(tmp_path.iterdir())
