"""Every kind of source reads from an S3 server what it reads from the same folder on disk."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from ray_jobs.config import ConfigError
from ray_jobs.data.samples import Source
from tests.unit.test_sources import every_kind, facts, image_folder, opened, samples

BUCKET = "pictures"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """host:port of an S3 server that holds an empty bucket."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        store = s3(f"{host}:{port}")
        store.create_dir(BUCKET)
        yield f"{host}:{port}"
        server.stop()


def s3(endpoint: str) -> fs.S3FileSystem:
    return fs.S3FileSystem(endpoint_override=endpoint, scheme="http", allow_bucket_creation=True)


def uploaded(path: Path, endpoint: str, root: Path) -> str:
    """Copy `root` into the bucket; the address there of `path`, which is `root` or lies in it."""
    fs.copy_files(
        str(root),
        f"{BUCKET}/{root.name}",
        source_filesystem=fs.LocalFileSystem(),
        destination_filesystem=s3(endpoint),
    )
    return f"s3://{BUCKET}/{path.relative_to(root.parent)}?endpoint_override={endpoint}&scheme=http"


def numbers_and_names(source: Source) -> list[tuple[int, str]]:
    return [(piece.number, piece.name) for piece in source.pieces]


@every_kind
def test_a_bucket_yields_what_the_folder_does(
    tmp_path: Path, endpoint: str, kind: Callable[[Path], Path]
) -> None:
    root = tmp_path / kind.__name__
    path = kind(root)
    here, there = opened(path), opened(uploaded(path, endpoint, root))
    assert numbers_and_names(here) == numbers_and_names(there)
    assert here.num_rows == there.num_rows
    reader: Source = pickle.loads(pickle.dumps(there.reader()))
    read = [facts(sample) for piece in there.pieces for sample in reader.read(piece)]
    assert read == [facts(sample) for sample in samples(here)]
    assert opened(there.name).digest == there.digest


def test_an_overwritten_object_changes_the_digest(tmp_path: Path, endpoint: str) -> None:
    root = image_folder(tmp_path / "overwritten")
    address = uploaded(root, endpoint, root)
    before = opened(address)
    with s3(endpoint).open_output_stream(f"{BUCKET}/overwritten/photos/0.png") as stream:
        stream.write(b"another picture")
    after = opened(address)
    changed = [old.digest != new.digest for old, new in zip(before.pieces, after.pieces, strict=True)]
    assert changed == [True, False]


def test_an_object_that_is_gone_is_missing(tmp_path: Path, endpoint: str) -> None:
    root = image_folder(tmp_path / "gone")
    address = uploaded(root, endpoint, root)
    s3(endpoint).delete_file(f"{BUCKET}/gone/photos/1.png")
    source = opened(address)
    reasons = [s.problem and s.problem.reason for s in source.read(source.pieces[0], {0, 1, 2})]
    assert reasons == [None, "missing_file", None]


@pytest.mark.parametrize("place", ["pictures/nowhere", "nobucket/x", "pictures/nowhere.parquet"])
def test_what_is_not_in_the_store_is_named(endpoint: str, place: str) -> None:
    with pytest.raises(ConfigError, match=f"data.source: s3://{place}.*: no such folder"):
        opened(f"s3://{place}?endpoint_override={endpoint}&scheme=http")
