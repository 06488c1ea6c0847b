"""Google's storage and S3 hold, list, give back and register what a folder on disk does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.storage import Storage, canonical
from ray_jobs.config import ConfigError, load_config
from ray_jobs.registry.digests import weights_digest
from ray_jobs.registry.models import champion, verify_weights
from ray_jobs.registry.promotion import Measured
from ray_jobs.registry.registration import register
from ray_jobs.run.folder import SharedFolder
from tests.gcs_server import GcsServer, gcs_server
from tests.s3_server import S3Server, s3_server
from tests.unit.test_clean import ENCODERS, Cleaner, configured, left, published

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
MEASURED = Measured(12.5, None, num_samples=96, feature_network="inception@sha256:7ff4", data="9f" * 32)


@pytest.fixture(scope="module", params=["gs", "s3"])
def server(request: pytest.FixtureRequest) -> Iterator[GcsServer | S3Server]:
    with (gcs_server if request.param == "gs" else s3_server)("bucket") as running:
        yield running


@pytest.fixture(scope="module")
def tracking_uri(server: GcsServer | S3Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One registry for all tests, because a new SQLite file takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


@pytest.fixture
def storage(server: GcsServer | S3Server, request: pytest.FixtureRequest) -> Storage:
    """A folder of this test, that nothing has been written to."""
    return Storage.open(server.address(f"{request.function.__name__}/runs"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of files in folders, one empty, one larger than a part of an upload."""
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "empty").touch()
    (folder / "notes.txt.gz").write_bytes(b"not compressed")
    save_file({"weight": torch.arange(3_000_000.0)}, folder / "unet" / "model.safetensors")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_listed_read_renamed_and_deleted(storage: Storage) -> None:
    assert (storage.exists(), storage.folders(), storage.files()) == (False, [], [])
    storage.write_text("demo/a.json", "{}")
    storage.write_text("demo/search/deep/b.json", "ü")
    storage.write_lines("rows.jsonl", [{"x": 1}])
    assert (storage.folders(), storage.files()) == (["demo"], ["rows.jsonl"])
    sizes = {name: size for name, size in storage.sizes().items() if size}  # GCS lists its placeholders
    assert sizes == {"demo/a.json": 2, "demo/search/deep/b.json": 2, "rows.jsonl": 9}
    assert canonical(storage.child("a b").uri) == f"{canonical(storage.uri)}/a b"
    assert (storage.child("demo").folders(), storage.child("demo").files()) == (["search"], ["a.json"])
    assert storage.child("demo", "search").read_text("deep/b.json") == "ü"
    assert all(storage.exists(name) for name in ("", "demo", "demo/search", "demo/a.json"))
    storage.rename("demo/a.json", "demo/c.json")
    assert storage.child("demo").files() == ["c.json"]
    with pytest.raises(FileNotFoundError):
        storage.read_text("demo/a.json")
    storage.write_text("demo/c.json", "other")
    assert storage.read_text("demo/c.json") == "other"
    storage.delete("demo/search")
    storage.delete("demo/missing")
    assert (storage.child("demo").folders(), storage.child("demo").files()) == ([], ["c.json"])
    storage.delete("demo")
    assert storage.folders() == [] and not storage.exists("demo")


def test_a_name_may_mean_something_in_addresses(storage: Storage) -> None:
    odd = storage.child("a #1? 50%25 'b'", "c")
    odd.write_text("d?.json", "{}")
    assert storage.child("a #1? 50%25 'b'").folders() == ["c"]
    again = Storage.open(odd.uri)
    assert (again.path, again.read_text("d?.json")) == (odd.path, "{}")


def test_a_folder_goes_up_and_comes_back_whole(storage: Storage, model: Path) -> None:
    storage.upload(model, "model")
    (model / "empty").unlink()
    storage.upload(model, "model")  # in place of the first one
    assert contents(storage.local_copy("model")) == contents(model)
    with storage.child("model").open_input("unet/model.safetensors") as file:
        file.seek(file.size() - 4)
        assert file.read() == contents(model)["unet/model.safetensors"][-4:]


def test_weights_are_registered_there_and_found_again(
    server: GcsServer | S3Server, storage: Storage, model: Path, tracking_uri: str
) -> None:
    """As the endpoint finds them: the champion's source, its digest, a copy of it on this machine."""
    config = load_config(DEMO, [f"storage={storage.uri}", f"publish.tracking_uri={tracking_uri}"])
    storage.upload(model, "demo/model")
    register(config, source=storage.child("demo", "model").uri, measured=MEASURED, params={"a": "1"})
    found = champion(config)
    assert found.source.startswith(f"{storage.uri.partition('?')[0]}/registry/")
    assert found.digest == weights_digest(str(model))
    verify_weights(found, found.source)
    assert contents(Storage.open(found.source).local_copy()) == contents(model)


@pytest.mark.parametrize("written", [[], ["unet/model.safetensors"], ["unet/model.safetensors", "empty"]])
def test_an_upload_that_was_killed_is_done_again(
    storage: Storage, model: Path, tracking_uri: str, written: list[str]
) -> None:
    """Killed after its folders, after the weights, or among the files that come last."""
    publish = [f"publish.tracking_uri={tracking_uri}", f"publish.model_name=written-{len(written)}"]
    config = load_config(DEMO, [f"storage={storage.uri}", *publish])
    kept = storage.child("registry", config.publish.model_name, weights_digest(str(model))[:16])
    kept.filesystem.create_dir(kept.path)
    kept.filesystem.create_dir(f"{kept.path}/unet")
    for name in written:
        kept.write_bytes(name, (model / name).read_bytes())
    register(config, source=str(model), measured=MEASURED, params={"a": "1"})
    found = champion(config)
    assert found.source == kept.uri and contents(kept.local_copy()) == contents(model)


@pytest.mark.parametrize("uri", ["az://container/runs", "abfs://container@account.dfs.core.windows.net/runs"])
def test_azure_is_refused_by_name(uri: str) -> None:
    with pytest.raises(
        ConfigError, match=f"storage: {uri}: Azure storage is not supported; use s3://, gs:// or"
    ):
        Storage.open(uri)


def test_a_published_run_is_cleaned_there(
    storage: Storage, tracking_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish = {"model_name": storage.filesystem.type_name, "tracking_uri": tracking_uri}
    config = configured(storage.uri, "cleaned", publish=publish)
    run = published(config, ["used.parquet"])
    cache = SharedFolder.of(config).encoded(ENCODERS)
    for name in ("used.parquet", "unused.parquet"):
        cache.write_text(name, "rows")
    told = Cleaner(config, tmp_path, capsys)("--keep", "winner", "--unused", "--delete")
    assert "deleted: 6.0 MiB" in told
    assert (left(run, "state"), left(run, "weights"), cache.files()) == ([], [4], ["used.parquet"])
    assert not run.root.child("lease").files()
