"""Files that users keep: those of older releases are read, newer formats are refused by name and number."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.manifest import Manifest
from ray_jobs.run.records import RESULTS, WINNER, RungRow, Winner, read_rows, write_rows
from ray_jobs.training.checkpoint import PROGRESS, read_progress
from ray_jobs.tuning.results import FINISHED, finished, read_result, search_digest
from tests.unit.test_report import WINNER as WON

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
# A row as releases before the number of the format wrote it.
OLD: dict[str, Any] = {
    "trial_id": "lr-0.001",
    "learning_rate": 1e-3,
    "settings": {"train.betas": [0.9, 0.99]},
    "training": "lr-0.001",
    "step": 80,
    "fid": 100.5,
    "fid_error": None,
    "feature_network": "inception@sha256:0",
    "num_samples": 8,
    "train_loss": 0.125,
    "validation_loss": 0.25,
    "validation_losses": [0.25, 0.25],
    "images_per_second": 31.5,
    "seconds": 12.0,
    "checkpoint": "/storage/train/lr-0.001/step-00000080",
    "guidance_scale": 2.0,
    "behind": 0.5,
    "behind_error": 1.0,
    "variance_ratio": None,
}


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path))


def read_first_row(folder: Storage) -> RungRow:
    return read_rows(folder)[0]


FILES: list[tuple[str, dict[str, Any], Callable[[Storage], Any]]] = [
    (PROGRESS, {"step": 80, "why": "rung", "world_size": 1}, read_progress),
    (RESULTS, OLD, read_first_row),
    (WINNER, WON, Winner.read),
]


@pytest.mark.parametrize(("file", "content", "read"), FILES)
def test_a_file_without_a_format_is_read_and_a_newer_one_is_refused_in_one_line(
    folder: Storage, file: str, content: dict[str, Any], read: Callable[[Storage], Any]
) -> None:
    folder.write_text("complete-0000-of-0001", "{}")  # marks a checkpoint as whole
    folder.write_text(file, json.dumps(content))
    old = read(folder)
    assert old.fields() == content
    folder.write_text(file, json.dumps(old.versioned()))
    assert json.loads(folder.read_text(file))["format"] == 1 and read(folder) == old
    folder.write_text(file, json.dumps(content | {"format": 2}))
    newer = rf"{folder.uri}/{file} was written by a newer diffray \(format 2\); this one reads format 1"
    with pytest.raises(ConfigError, match=newer) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lacking", ["trial_id", "step", "fid"])
def test_a_row_without_what_identifies_it_names_the_file_and_the_field(folder: Storage, lacking: str) -> None:
    folder.write_lines(RESULTS, [{name: value for name, value in OLD.items() if name != lacking}])
    with pytest.raises(ConfigError, match=rf"{RESULTS}: {lacking}: Field required"):
        read_rows(folder)


def test_keys_that_nobody_knows_stay_in_the_file(folder: Storage) -> None:
    by_hand = {"trial_id": "mine", "step": 7, "fid": 9.0, "note": "kept", "tags": ["a"]}
    folder.write_lines(RESULTS, [by_hand])
    rows = read_rows(folder)
    write_rows(folder, [*rows, rows[0] | {"step": 8}])
    assert folder.read_lines(RESULTS) == [{"format": 1} | by_hand, {"format": 1} | by_hand | {"step": 8}]


def test_a_search_that_an_older_release_has_finished_is_recognised(folder: Storage) -> None:
    config: Config = load_config(DEMO, [f"storage={folder.uri}"])
    search = RunFolder.of(config).search
    dataset = Dataset(folder, folder, Manifest(content="pictures"))
    extent = json.loads(finished(config, dataset, RungRow.model_validate(OLD)))["extent"]
    winner = dict(reversed(OLD.items()))  # in whatever order that release wrote its fields
    written = json.dumps({"digest": search_digest(config, dataset), "extent": extent, "winner": winner})
    search.write_text(FINISHED, written)
    search.write_lines(RESULTS, [OLD])
    found = read_result(config, dataset)
    assert found is not None and found.winner.fields() == OLD
    # The digest by which publish knows that nothing has changed.
    assert found.digest == hashlib.sha256(written.encode()).hexdigest()
