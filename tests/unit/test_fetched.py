"""Models and networks in an object store are fetched once per node, whole, and used like local ones."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs
from safetensors.torch import load_file

from cluster.fetched import local_path
from ray_jobs.config import ConfigError, load_config
from ray_jobs.data.preparation import _open
from ray_jobs.import_weights import imported_adapter
from ray_jobs.run.folder import RunFolder
from ray_jobs.training.setup import build_model, check_settings
from ray_jobs.weights.feature_networks import check_networks, load_networks
from ray_jobs.weights.loading import LORA_WEIGHTS, load_pipeline
from ray_jobs.weights.model_files import encoders_digest
from serving.replica.postprocess import Postprocessor
from tests.s3_server import S3Server, s3_server
from tests.unit.test_comfyui import adapter

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server("models") as running:
        yield running


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stored(server: S3Server, local: Path, name: str) -> str:
    """The address of a local file or folder in the bucket."""
    destination = f"{server.bucket}/{name}"
    options = {"source_filesystem": fs.LocalFileSystem(), "destination_filesystem": server.filesystem()}
    if local.is_dir():
        for folder in [local, *(path for path in local.rglob("*") if path.is_dir())]:
            below = folder.relative_to(local).as_posix()
            server.filesystem().create_dir(f"{destination}/{below}".removesuffix("/."))
    fs.copy_files(str(local), destination, **options)
    return server.address(name)


def test_a_base_in_a_bucket_trains_and_draws_as_the_local_one(
    server: S3Server, tiny_model: Path, tmp_path: Path
) -> None:
    address = stored(server, tiny_model, "bases/tiny")
    config = load_config(DEMO, [f"model.base={address}", "train.method=full", f"storage={tmp_path}"])
    check_settings(config)
    pipeline, _ = build_model(config)
    _, digest = _open(config, RunFolder.of(config).dataset)
    assert digest == encoders_digest(str(tiny_model))
    local = load_pipeline(str(tiny_model))
    expected = local.unet.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert Path(local_path(address)).name == "tiny"
    facts = Postprocessor(config.serve.model_copy(update={"safety_checker": None}), config.evaluate, address)
    assert facts._base == "tiny", "neither keys nor a bucket get into pictures"


def test_feature_networks_in_a_bucket_are_fetched(
    server: S3Server, clip_folder: Path, script: tuple[Path, str], tmp_path: Path
) -> None:
    path, digest = script
    network: dict[str, Any] = {
        "kind": "torchscript",
        "path": stored(server, path, "networks/means.pt"),
        "sha256": digest,
    }
    network |= {"name": "means", "size": 28, "interpolation": "bicubic", "mean": [0, 0, 0], "std": [1, 1, 1]}
    clip = stored(server, clip_folder, "networks/clip")
    config = load_config(DEMO)
    second = {"kind": "transformers", "path": clip}
    evaluate = type(config.evaluate).model_validate(
        config.evaluate.model_dump() | {"feature_network": network, "second_network": second, "clip": clip}
    )
    check_networks(evaluate)
    networks = load_networks(evaluate, "cpu")
    assert len(networks.ranking) == 2 and networks.clip is not None


def test_it_is_fetched_once_however_many_ask_and_anew_when_it_has_changed(
    server: S3Server, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "a.json").write_text("1")
    (tmp_path / "model" / "unet" / "b.json").write_text("2")
    address = stored(server, tmp_path / "model", "changing")
    with ThreadPoolExecutor(4) as pool:  # a second copy could not take the place of the first
        [folder] = map(Path, set(pool.map(local_path, [address] * 4)))
    assert (folder / "unet" / "b.json").read_text() == "2"
    assert not [path for path in cache.rglob("*") if path.name.endswith(".partial")]
    inode = folder.stat().st_ino
    assert Path(local_path(address)).stat().st_ino == inode
    (tmp_path / "model" / "a.json").write_text("other")
    stored(server, tmp_path / "model", "changing")
    assert (Path(local_path(address)) / "a.json").read_text() == "other"
    assert (folder / "a.json").read_text() == "1"


def test_what_an_interrupted_fetch_left_does_not_count(server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"content")
    address = stored(server, tmp_path / "file.bin", "file.bin")
    found = Path(local_path(address))
    found.unlink()
    aside = found.parent / ".1.partial"
    aside.mkdir()
    (aside / found.name).write_bytes(b"con")
    assert Path(local_path(address)).read_bytes() == b"content"


@pytest.mark.parametrize("field", ["model.base", "evaluate.feature_network"])
def test_what_is_not_there_is_named_without_its_keys(server: S3Server, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: s3://models/nowhere: there are no files") as caught:
        local_path(server.address("nowhere"), field)
    assert "testing" not in str(caught.value)


def test_local_paths_and_names_of_the_hub_stay(tmp_path: Path) -> None:
    assert local_path("org/model") == "org/model" and local_path(str(tmp_path)) == str(tmp_path)
    assert not os.path.exists(os.environ["DIFFRAY_CACHE"])


def test_an_adapter_in_a_bucket_is_imported_without_its_keys_in_the_records(
    server: S3Server, tiny_model: Path, tmp_path: Path
) -> None:
    adapter(tiny_model, tmp_path / "style")
    address = stored(server, tmp_path / "style" / LORA_WEIGHTS, "adapters/style.safetensors")
    config = load_config(DEMO, [f"model.base={tiny_model}", f"storage={tmp_path}"])
    found = {}
    for name in (address, f"{address}=0.5", str(tmp_path / "style")):
        with imported_adapter(config, [name]) as imported:
            found[name] = imported.tags, load_file(imported.folder / LORA_WEIGHTS)
    (tags, tensors), (halved, _), (_, local) = found.values()
    assert tags["imported_from"] == "s3://models/adapters/style.safetensors"
    assert halved["imported_from"] == "s3://models/adapters/style.safetensors=0.5"
    assert tensors.keys() == local.keys() and all(torch.equal(tensors[key], local[key]) for key in local)
