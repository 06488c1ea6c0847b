"""The length of a training in epochs or steps, which becomes the ladder once the rows are known."""

from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.config.yaml_text import read_yaml
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.run.manifest import Manifest
from ray_jobs.training.loop import LoopSettings
from ray_jobs.tuning.results import search_digests


def of_length(train: dict[str, Any], **search: Any) -> Config:
    return Config.model_validate(
        {
            "name": "length",
            "data": {"source": "pictures"},
            "model": {"base": "base"},
            "train": {"batch_size": 16} | train,
            "search": {"learning_rates": [1e-3]} | search,
        }
    )


@pytest.mark.parametrize(
    ("train", "search", "ladder"),
    [
        ({"epochs": 10}, {}, [15, 30, 61]),  # 97 rows: 60.6 steps
        ({"epochs": 10}, {"reduction_factor": 4}, [3, 12, 61]),
        ({"epochs": 0.1}, {}, [1]),
        ({"epochs": 10, "max_steps": 40}, {}, [10, 20, 40]),
        ({"epochs": 10, "max_steps": 400}, {}, [15, 30, 61]),
        ({"max_steps": 3}, {}, [1, 2, 3]),
        ({"epochs": 10, "batch_size": 32, "prior_loss_weight": 1.0}, {}, [15, 30, 61]),  # 16 class pictures
    ],
)
def test_epochs_are_passes_over_the_training_rows_and_max_steps_caps_them(
    train: dict[str, Any], search: dict[str, Any], ladder: list[int]
) -> None:
    assert of_length(train, **search).with_ladder(97).search.ladder == ladder


def test_a_training_of_some_epochs_is_that_of_the_ladder_they_come_to(tmp_path: Path) -> None:
    given, found = of_length({}, ladder=[15, 30, 61]), of_length({"epochs": 10}).with_ladder(97)
    assert found == given and Config.model_validate(read_yaml(found.to_yaml())) == given
    assert given.with_ladder(97) is given
    storage = Storage.open(str(tmp_path))
    dataset = Dataset(storage, storage, Manifest())
    assert search_digests(found, dataset) == search_digests(given, dataset)


def test_schedules_and_stages_end_with_the_last_epoch() -> None:
    stages = [{"steps": 20}, {"steps": 1, "schedule": "linear"}]
    config = of_length({"epochs": 10, "stages": stages}).with_ladder(97)
    storage = Storage.open("unused")
    settings = LoopSettings(config, Dataset(storage, storage, Manifest()), "trial", config.search.ladder)
    last = settings.stages[-1]
    assert (last.first, last.last, last.schedule.steps) == (21, 61, 41)
    with pytest.raises(ConfigError, match="last stage begins after step 20, but search.ladder ends at 7"):
        of_length({"epochs": 1, "stages": stages}).with_ladder(97)


def test_epochs_that_are_not_one_number_of_steps_are_refused() -> None:
    space = {"train.batch_size": [8, 16]}
    with pytest.raises(ValueError, match="trials that differ in the rows of a step"):
        of_length({"epochs": 3}, space=space)
    of_length({"max_steps": 30}, space=space)
