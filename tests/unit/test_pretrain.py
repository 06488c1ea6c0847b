"""Pretraining reuses the steps that it has finished only for the settings that it began with."""

from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config import Config, ConfigError
from ray_jobs.pretrain import depends_on, pretrain
from ray_jobs.run.folder import RunFolder
from ray_jobs.training.trainer import require_same


def configured(storage: Path, **changes: Any) -> Config:
    sections: dict[str, Any] = {
        "name": "new-base",
        "storage": str(storage),
        "data": {"source": "captions"},
        "model": {"base": "unused"},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
        "pretrain": {"output": "model", "pictures": "pictures"},
    }
    for name, value in changes.items():
        sections[name] = sections[name] | value if isinstance(value, dict) else value
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"pretrain": {"autoencoder_steps": 9}}, r"pretrain\.autoencoder_steps: 9 now, .* started with 8000"),
        ({"pretrain": {"vocabulary": 300}}, r"pretrain\.vocabulary: 300 now, .* started with 1500"),
        ({"pretrain": {"pictures": "others"}}, r"pretrain\.pictures: others now, .* started with pictures"),
        ({"data": {"resolution": 32}}, r"data\.resolution: 32 now, .* started with 64"),
        ({"seed": 1}, "seed: 1 now, .* started with 0"),
    ],
)
def test_steps_of_other_settings_are_not_reused(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    config = configured(tmp_path)
    run = RunFolder.of(config)
    require_same(run.root, depends_on(config))
    with pytest.raises(ConfigError, match=named):
        pretrain(configured(tmp_path, **changed))
    assert run.root.folders() == []


def test_where_the_model_goes_and_what_comes_after_change_nothing(tmp_path: Path) -> None:
    other = configured(tmp_path, pretrain={"output": "elsewhere"}, data={"encode_workers": 4})
    assert depends_on(other) == depends_on(configured(tmp_path))
