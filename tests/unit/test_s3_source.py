"""Every kind of source reads from S3 and from Google's storage what it reads from the same folder on disk."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from ray_jobs.config import ConfigError
from ray_jobs.data.sources.samples import Source
from tests.gcs_server import GcsServer, gcs_server
from tests.s3_server import S3Server, s3_server
from tests.unit.test_sources import every_kind, facts, image_folder, labelbox, opened, samples

BUCKET = "pictures"
Server = S3Server | GcsServer


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with (s3_server if request.param == "s3" else gcs_server)(BUCKET) as server:
        yield server


def uploaded(path: Path, server: Server, root: Path) -> str:
    """Copy `root` into the bucket; the address there of `path`, which is `root` or lies in it."""
    fs.copy_files(
        str(root),
        f"{BUCKET}/{root.name}",
        source_filesystem=fs.LocalFileSystem(),
        destination_filesystem=server.filesystem(),
    )
    return server.address(str(path.relative_to(root.parent)))


def numbers_and_names(source: Source) -> list[tuple[int, str]]:
    return [(piece.number, piece.name) for piece in source.pieces]


@every_kind
def test_a_bucket_yields_what_the_folder_does(
    tmp_path: Path, server: Server, kind: Callable[[Path], Path]
) -> None:
    root = tmp_path / kind.__name__
    path = kind(root)
    here, there = opened(path), opened(uploaded(path, server, root))
    assert numbers_and_names(here) == numbers_and_names(there)
    assert here.num_rows == there.num_rows
    reader: Source = pickle.loads(pickle.dumps(there.reader()))
    read = [facts(sample) for piece in there.pieces for sample in reader.read(piece)]
    assert read == [facts(sample) for sample in samples(here)]
    assert opened(there.name).digest == there.digest


def test_an_overwritten_object_changes_the_digest(tmp_path: Path, server: Server) -> None:
    root = image_folder(tmp_path / "overwritten")
    address = uploaded(root, server, root)
    before = opened(address)
    with server.filesystem().open_output_stream(f"{BUCKET}/overwritten/photos/0.png") as stream:
        stream.write(b"another picture")
    after = opened(address)
    changed = [old.digest != new.digest for old, new in zip(before.pieces, after.pieces, strict=True)]
    assert changed == [True, False]


def test_an_object_that_is_gone_is_missing(tmp_path: Path, server: Server) -> None:
    root = image_folder(tmp_path / "gone")
    address = uploaded(root, server, root)
    server.filesystem().delete_file(f"{BUCKET}/gone/photos/1.png")
    source = opened(address)
    reasons = [s.problem and s.problem.reason for s in source.read(source.pieces[0], {0, 1, 2})]
    assert reasons == [None, "missing_file", None]


def test_an_export_in_a_bucket_is_a_source_by_its_own_name(tmp_path: Path, server: Server) -> None:
    root = labelbox(tmp_path / "exported")
    address = uploaded(root / "export.ndjson", server, root)
    assert [facts(s) for s in samples(opened(address))] == [facts(s) for s in samples(opened(root))]
    there = opened(uploaded(root, server, root), annotations=str(root / "export.ndjson"))
    assert [s.text for s in samples(there)] == ["a 0", "a 1", "a 2"]


@pytest.mark.parametrize("place", ["pictures/nowhere", "nobucket/x", "pictures/nowhere.parquet"])
def test_what_is_not_in_the_store_is_named(server: Server, place: str) -> None:
    address = server.address("").replace(f"@{BUCKET}/", f"@{place}")
    with pytest.raises(ConfigError, match=f"data.source: (s3|gs)://.*{place}.*: no such folder"):
        opened(address)
