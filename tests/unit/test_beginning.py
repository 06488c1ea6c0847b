"""What a run begins from: versions are found once, by their name, and used as what they are.

With a real MLflow.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ray_jobs.config import Config, ConfigError, named_version
from ray_jobs.registry.aliases import promote
from ray_jobs.registry.beginning import beginning_names, read_beginnings, with_beginning
from ray_jobs.registry.models import open_client
from ray_jobs.registry.registration import register
from ray_jobs.run.folder import BEGINS_FROM, RunFolder
from ray_jobs.weights.loading import LORA_WEIGHTS
from tests.serving.test_registry import MEASURED

RANK = 3


def changed(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def adapter(folder: Path, value: float) -> str:
    shapes = {"A": (RANK, 8), "B": (8, RANK)}
    tensors = {
        f"unet.attn.to_q.lora_{side}.weight": torch.full(shape, value) for side, shape in shapes.items()
    }
    folder.mkdir()
    save_file(tensors, folder / LORA_WEIGHTS)
    return str(folder)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """Two versions of an adapter, the first of them the champion, and one of a whole model."""
    folder = tmp_path_factory.mktemp("beginning")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        config = Config.model_validate(
            {
                "name": "second",
                "storage": str(folder / "runs"),
                "data": {"source": "unused"},
                "model": {"base": "organisation/model"},
                "search": {"learning_rates": [1e-3], "ladder": [2]},
                "publish": {"model_name": "first"},
            }
        )
        for number in (1, 2):
            register(config, source=adapter(folder / f"{number}", number), measured=MEASURED, params={})
        whole = changed(changed(config, "publish", model_name="whole"), "train", method="full")
        register(whole, source=adapter(folder / "whole", 3), measured=MEASURED, params={})
        yield config


def begins(config: Config, **model: str) -> Config:
    return changed(config, "model", **model)


def test_an_alias_stands_for_the_version_that_it_had_when_the_run_began(registry: Config) -> None:
    run = begins(registry, adapter="first:champion")
    begun = with_beginning(run)
    assert begun.model.adapter and Path(begun.model.adapter, LORA_WEIGHTS).is_file()
    assert (begun.train.lora.rank, begun.train.lora.alpha) == (RANK, RANK)
    assert beginning_names(begun) == {"adapter": "first@1"}
    assert read_beginnings(begun)["adapter"].data == MEASURED.data
    try:
        promote(registry, 2)
        assert with_beginning(run) == begun == with_beginning(begun)
        again = with_beginning(run, anew=True, kept=False)
        assert again.model.adapter != begun.model.adapter
        assert beginning_names(begun) == {"adapter": "first@1"}
    finally:
        promote(registry, 1)
    assert with_beginning(begins(registry, adapter="first@2")).model.adapter == again.model.adapter
    assert with_beginning(registry) == registry
    assert json.loads(RunFolder.of(registry).root.read_text(BEGINS_FROM)) == {}


def test_a_whole_model_is_a_base_and_an_adapter_is_none(
    registry: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    found = with_beginning(begins(registry, base="whole@1", adapter="first@1"), kept=False)
    assert found.model.base == open_client(registry).get_model_version("whole", "1").source
    assert "first@1 was trained on organisation/model, not on whole@1" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match=r"^model\.adapter: whole@1 is a whole model; give it as model\.base$"
    ):
        with_beginning(begins(registry, adapter="whole@1"))
    refused = (
        r"^model\.base: first@1 is an adapter; give it as model\.adapter, with its base organisation/model"
    )
    with pytest.raises(ConfigError, match=refused):
        with_beginning(begins(registry, base="first@1"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("first@7", "7: no version or alias of 'first'"),
        ("first:none", "none: no version or alias of 'first'"),
        ("none:champion", "holds no champion of 'none'"),
    ],
)
def test_a_version_that_is_not_there_is_named(registry: Config, given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.adapter: {given}: .*{message}") as refused:
        with_beginning(begins(registry, adapter=given))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("first@3", ("first", "3")),
        ("my model-2.1:champion", ("my model-2.1", "champion")),
        ("org/first@3", None),
        ("./first@3", None),
        ("first", None),
        ("s3://bucket/first", None),
        (None, None),
    ],
)
def test_the_form_is_that_of_requests(given: str | None, expected: tuple[str, str] | None) -> None:
    assert named_version(given) == expected


def test_earlier_runs_to_remember_are_other_runs(registry: Config) -> None:
    given = registry.model_dump()
    for runs in (["second"], ["first", "first"], ["../first"]):
        with pytest.raises(ValueError, match=r"remember"):
            Config.model_validate(given | {"evaluate": {"remember": runs}})
