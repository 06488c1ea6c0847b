"""Storage: the same view over a local folder and over an object store."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import fs
from sqlalchemy import create_engine, text

from cluster.sqlite import from_home, sqlite_file, sqlite_url
from cluster.storage import Storage
from ray_jobs.config import ConfigError, resolve_path

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["local", "remote"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A local folder; and a filesystem whose paths are no local paths, as an object store's."""
    if request.param == "local":
        return Storage.open(str(tmp_path / "runs"))
    (tmp_path / "bucket" / "runs" / "demo").mkdir(parents=True)
    rooted = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    return Storage("s3://bucket/runs", rooted, "bucket/runs")


def test_text_is_read_as_it_was_written(storage: Storage) -> None:
    storage.write_text("demo/état.json", "ünï")
    assert storage.read_text("demo/état.json") == "ünï"


def test_a_missing_file_does_not_exist_and_cannot_be_read(storage: Storage) -> None:
    assert not storage.exists("demo/winner.json")
    with pytest.raises(FileNotFoundError):
        storage.read_text("demo/winner.json")


def test_a_gz_name_is_not_compressed(storage: Storage) -> None:
    storage.write_bytes("demo/plain.gz", b"as it is")
    assert storage.local_copy("demo/plain.gz").read_bytes() == b"as it is"


def test_a_child_sees_the_same_files(storage: Storage) -> None:
    storage.write_text("demo/config.yaml", "name: demo")
    child = storage.child("demo")
    assert child.read_text("config.yaml") == "name: demo"
    assert child.uri == storage.uri + "/demo"
    assert child.exists()


def test_upload_replaces_a_folder_whole(storage: Storage, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "unet").mkdir(parents=True)
    (first / "unet" / "old.txt").write_text("old")
    (second / "unet").mkdir(parents=True)
    (second / "unet" / "new.txt").write_text("new")
    storage.upload(first, "demo/model")
    storage.upload(second, "demo/model")
    copy = storage.local_copy("demo/model")
    assert [path.name for path in (copy / "unet").iterdir()] == ["new.txt"]


def test_delete_takes_files_folders_and_what_is_missing(storage: Storage) -> None:
    storage.write_text("demo/a.txt", "a")
    storage.delete("demo/a.txt")
    assert not storage.exists("demo/a.txt")
    storage.delete("demo")
    storage.delete("demo")
    assert not storage.exists("demo")


def test_local_copy_of_a_missing_file_names_the_storage(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError, match=storage.uri):
        storage.local_copy("nothing")


def test_a_local_copy_of_a_local_file_is_the_file(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    storage.write_text("a.txt", "a")
    assert storage.local_copy("a.txt") == tmp_path / "a.txt"


def test_a_local_write_leaves_no_partial_file(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    storage.write_text("a.txt", "one")
    storage.write_text("a.txt", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("former", [True, False])
def test_an_upload_that_fails_leaves_the_former_folder_and_nothing_else(tmp_path: Path, former: bool) -> None:
    storage = Storage.open(str(tmp_path / "runs"))
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a.txt").write_text("good")
    if former:
        storage.upload(tmp_path / "good", "model")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "dangling").symlink_to("nowhere")
    with pytest.raises(shutil.Error):
        storage.upload(tmp_path / "bad", "model")
    assert storage.folders() == (["model"] if former else [])
    if former:
        assert storage.read_text("model/a.txt") == "good"


def test_a_full_disk_leaves_the_former_content_and_no_partial_file(
    tmp_path: Path,
) -> None:
    storage = Storage.open(str(tmp_path))
    storage.write_text("a.txt", "former")
    program = f"""
import resource, signal
from cluster.storage import Storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    Storage.open({str(tmp_path)!r}).write_bytes("a.txt", bytes(100_000))
except OSError as error:
    print(error.errno)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == str(errno.EFBIG), result.stderr
    assert storage.files() == ["a.txt"] and storage.read_text("a.txt") == "former"


def test_in_a_store_the_files_that_readers_look_for_first_are_the_last_of_an_upload(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    storage = Storage("s3://bucket", fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "bucket")
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    (model / "unet" / "weights").write_bytes(bytes(10))
    storage.upload(model, "model")
    written = tmp_path / "bucket" / "model"
    times = [(written / name).stat().st_mtime_ns for name in ("unet/weights", "model_index.json")]
    assert times == sorted(times) and times[0] < times[1]


def test_relative_paths_start_from_diffray_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRAY_HOME", str(tmp_path))
    assert Storage.open("runs").path == str(tmp_path / "runs")
    (tmp_path / "pictures").mkdir()
    assert resolve_path("pictures") == str(tmp_path / "pictures")


def test_hub_names_and_addresses_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRAY_HOME", str(tmp_path))
    assert resolve_path("organisation/model") == "organisation/model"
    assert resolve_path("s3://bucket/pictures") == "s3://bucket/pictures"


def test_the_query_of_an_address_stays_at_its_end() -> None:
    storage = Storage("s3://bucket/runs?region=eu-north-1", fs.LocalFileSystem(), "bucket/runs")
    assert storage.child("demo").uri == "s3://bucket/runs/demo?region=eu-north-1"
    assert storage.child("demo").path == "bucket/runs/demo"


def test_an_unknown_kind_of_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="s3:// or gs://"):
        Storage.open("ftp://host/runs")


ODD = "runs#1? 50%25 'a' \"b\" c&d+é"


def test_a_folder_with_any_name_holds_what_is_written_below_it(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path / ODD))
    below = storage.child("demo", "model")
    assert (below.uri, below.path) == (f"{tmp_path}/{ODD}/demo/model",) * 2
    below.write_text("a.json", "{}")
    assert (tmp_path / ODD / "demo" / "model" / "a.json").read_text() == "{}"
    assert Storage.open(below.uri).exists("a.json")
    assert Storage.open((tmp_path / ODD).as_uri()).uri == storage.uri


def test_the_url_of_a_sqlite_file_names_that_file(tmp_path: Path) -> None:
    """SQLAlchemy would read a `?` as the beginning of options, and decode a `%25`."""
    file = tmp_path / ODD / "a.db"
    file.parent.mkdir()
    engine = create_engine(sqlite_url(file))
    with engine.begin() as connection:
        connection.execute(text("create table t (x integer)"))
    engine.dispose()
    assert [path.name for path in file.parent.iterdir()] == ["a.db"]
    assert [path.name for path in tmp_path.iterdir()] == [ODD]
    assert sqlite_file(sqlite_url(file)) == file


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("sqlite:///runs/a b.db", Path("runs/a b.db")),
        ("sqlite:////runs/a.db?timeout=5", Path("/runs/a.db")),
        ("sqlite+pysqlite:///runs/a.db", Path("runs/a.db")),
        ("sqlite://", None),
        ("postgresql+psycopg://user@host/a", None),
        ("http://mlflow:5000", None),
        ("./mlruns", None),
    ],
)
def test_the_file_of_a_url(url: str, file: Path | None) -> None:
    assert sqlite_file(url) == file


@pytest.mark.parametrize(
    ("url", "of_home"),
    [
        ("sqlite:///runs/a b.db", "sqlite:///{home}/runs/a b.db"),
        ("sqlite+pysqlite:///a.db?timeout=5", "sqlite+pysqlite:///{home}/a.db?timeout=5"),
        ("sqlite:///~/a.db", "sqlite:///{user}/a.db"),
        ("sqlite:///50%2525%3F.db", "sqlite:///{home}/50%2525%3F.db"),
        ("sqlite:////runs/a.db?timeout=5", None),
        ("sqlite:///:memory:", None),
        ("sqlite:///file:a.db?uri=true", None),
        ("postgresql+psycopg://user:a%20b@host/a", None),
        ("http://mlflow:5000", None),
        ("nonsense", None),
    ],
)
def test_the_relative_path_of_a_database_starts_from_diffray_home(
    url: str, of_home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / ODD
    monkeypatch.setenv("DIFFRAY_HOME", str(home))
    found = from_home(url)
    escaped = sqlite_url(home).removeprefix("sqlite:///")
    assert found == (of_home.format(home=escaped, user=Path.home()) if of_home else url)
    if of_home and "~" not in url:
        file = sqlite_file(url)
        assert file is not None and sqlite_file(found) == home / file
