"""`train.method: controlnet`: settings that go with it, what is trained, and what a checkpoint holds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.config import Config
from ray_jobs.diffusion.families import CONTROLLED
from ray_jobs.planning.footprint import footprint
from ray_jobs.planning.inference import needs
from ray_jobs.training.setup import build_model, check_settings, exporter
from ray_jobs.weights.controlnets import given_folder
from ray_jobs.weights.loading import load_pipeline
from tests.tiny_models import write

FAMILIES = [family.pipeline_class for family in CONTROLLED.values()]


def settings(**sections: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {
        "name": "edges",
        "data": {"source": "pictures", "resolution": 64, "control": {"kind": "edges"}},
        "model": {"base": "base"},
        "train": {"method": "controlnet"},
        "search": {"learning_rates": [1e-4], "ladder": [2]},
    }
    return given | {name: given.get(name, {}) | section for name, section in sections.items()}


def configured(base: Path, **sections: dict[str, Any]) -> Config:
    found = settings(**sections)
    found["model"] = found["model"] | {"base": str(base)}
    return Config.model_validate(found)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"data": {"control": {}}}, "controlnet needs a control image of each row; name control_column"),
        ({"train": {"train_text_encoder": True}}, "method controlnet leaves the base as it is"),
        ({"model": {"quantize": "nf4"}}, "model.quantize: nf4 leaves no plain layers for a ControlNet"),
        ({"model": {"adapter": "style"}}, "model.adapter: style is for adapters"),
        ({"train": {"dropout": 0.1}}, "dropout: 0.1 needs method: full"),
        ({"search": {"pack": 2}}, "train.method: controlnet trains whole layers"),
        (
            {"search": {"space": {"train.lora.rank": [4, 8]}}},
            r"train\.lora\.rank changes nothing with train\.method: controlnet",
        ),
    ],
)
def test_settings_that_do_not_go_with_it_are_named(sections: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Config.model_validate(settings(**sections))


def test_settings_of_control_nets_are_for_them() -> None:
    plain: dict[str, Any] = {"data": {"control": {}}}
    with pytest.raises(ValueError, match=r"controlnet_layers.*method: lora"):
        Config.model_validate(settings(**plain, train={"method": "lora", "controlnet_layers": 2}))
    with pytest.raises(ValueError, match=r"controlnet.*train\.method: lora"):
        Config.model_validate(settings(**plain, train={"method": "lora"}, model={"controlnet": "edges"}))
    with pytest.raises(ValueError, match="controlnet_revision"):
        Config.model_validate(settings(model={"controlnet_revision": "main"}))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_writes_a_control_net_that_plain_diffusers_reads(name: str, tmp_path: Path) -> None:
    import diffusers

    base = write(name, tmp_path / "base")
    config = configured(base, train={"gradient_checkpointing": True, "micro_batch_size": 2})
    family, _ = check_settings(config)
    pipeline, model = build_model(config)
    names = {key for key, _ in model.all_trained}
    assert names and all(key.startswith("further_denoisers.controlnet.") for key in names)
    assert not any(each.requires_grad for each in model.denoiser.parameters())
    assert all(part.is_gradient_checkpointing for part in model.model.values())
    export = exporter(config, pipeline, model, 0)
    weights = {key: each.detach() + 0.25 for key, each in model.all_trained}
    export(weights, tmp_path / "rung")
    assert {path.name for path in (tmp_path / "rung").iterdir()} == {"controlnet"}
    assert family.control
    kind = getattr(diffusers, family.control.network_class)
    read = dict(kind.from_pretrained(tmp_path / "rung", subfolder="controlnet").named_parameters())
    for key, value in weights.items():
        assert torch.equal(read[key.removeprefix("further_denoisers.controlnet.")], value)
    whole = load_pipeline(str(base), tmp_path / "rung")
    assert type(whole).__name__ == family.control.pipeline_class
    # Training goes on from it, whatever it was begun with.
    again = configured(base, model={"controlnet": str(tmp_path / "rung")})
    check_settings(again)
    _, resumed = build_model(again)
    assert all(torch.equal(dict(resumed.all_trained)[key], value) for key, value in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionPipeline"])
def test_a_plan_counts_the_control_net_beside_its_base(name: str, tmp_path: Path) -> None:
    config = configured(write(name, tmp_path / "base"))
    found, (encoding, drawing, serving) = footprint(config), needs(config)
    _, model = build_model(config)
    assert found.trained == sum(each.numel() for _, each in model.all_trained)
    assert found.base == sum(each.numel() for each in model.parameters())
    recomputed = footprint(configured(Path(config.model.base), train={"gradient_checkpointing": True}))
    assert 0 < recomputed.activations < found.activations
    plain = Config.model_validate(
        settings(data={"control": {}}, train={"method": "lora"}, model={"base": config.model.base})
    )
    without = needs(plain)
    added = 4 * found.trained
    assert encoding.weights == without[0].weights
    assert drawing.weights - without[1].weights >= added
    assert serving.weights >= 2 * (without[2].weights + added)  # a new champion beside the one that answers


@pytest.mark.slow
def test_what_cannot_be_a_control_net_is_named(tmp_path: Path) -> None:
    base = write("StableDiffusionPipeline", tmp_path / "base")
    (tmp_path / "empty").mkdir()
    for given, told in (
        (
            {"controlnet": str(tmp_path / "empty")},
            "empty: a folder with config.json and safetensors is",
        ),
        (
            {"controlnet": "no such/name"},
            "controlnet: no such/name: neither a folder nor a name of the hub",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            given_folder(configured(base, model=given).model)
    with pytest.raises(ValueError, match=r"train\.controlnet_layers: 2; a ControlNetModel has all blocks"):
        check_settings(configured(base, train={"controlnet_layers": 2}))
    chroma = write("ChromaPipeline", tmp_path / "chroma")
    with pytest.raises(ValueError, match=r"ChromaPipeline has no ControlNets here, only Flux.*choose one"):
        check_settings(configured(chroma))
