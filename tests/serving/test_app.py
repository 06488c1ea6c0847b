"""What is told before an endpoint starts: who may ask, and which switches do not go together."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve import Application

from ray_jobs.config import Config, ConfigError, ServeConfig
from ray_jobs.registry.models import REFERENCE, RegisteredModel
from serving.app import build_application, check_base
from serving.client import KEY_VARIABLE
from serving.command import main


def changed(config: Config, **fields: Any) -> Config:
    return config.model_copy(update={"serve": config.serve.model_copy(update=fields)})


@pytest.fixture
def version(tmp_path: Path) -> RegisteredModel:
    (tmp_path / REFERENCE).touch()
    return RegisteredModel("m", 1, str(tmp_path), "00" * 32, "base", None, "lora", {})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"keys": None}, "serve.keys: nobody may ask this server"),
        ({"keys": "/nowhere/keys.json"}, "serve.keys: /nowhere/keys.json: no such file"),
        ({"compile": True}, "serve.compile: m version 1 is a LoRA version"),
    ],
)
def test_a_mistake_names_its_field_before_anything_starts(
    config: Config, version: RegisteredModel, fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        build_application(changed(config, **fields), version)


@pytest.mark.parametrize("switch", ["fuse_champion", "int8_weights"])
def test_a_version_of_a_quantized_base_is_neither_fused_nor_quantized_again(
    config: Config, version: RegisteredModel, switch: str
) -> None:
    stored = replace(version, quantization="nf4")
    with pytest.raises(ConfigError, match=f"serve.{switch}: m version 1 .* stored as nf4.*turn it off"):
        build_application(changed(config, **{switch: True}), stored)
    build_application(changed(config, **{switch: True}), version)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"channels_last": True}, "serve.channels_last: FluxTransformer2DModel has almost no convolutions"),
        ({"cache_features": True}, "serve.cache_features: only a UNet"),
        ({"solver": "dpm++"}, "serve.solver: FlowMatchEulerDiscreteScheduler is for flow matching"),
    ],
)
def test_a_switch_that_the_model_cannot_have_is_refused_before_it_is_loaded(
    config: Config,
    version: RegisteredModel,
    tiny_model: Path,
    tiny_flux: Path,
    fields: dict[str, Any],
    expected: str,
) -> None:
    wrong = changed(config, **fields)
    adapter = replace(version, base=str(tiny_flux))
    whole = replace(version, base="gone/base", source=str(tiny_flux), method="full")
    for each in (adapter, whole):
        with pytest.raises(ConfigError, match=expected):
            check_base(wrong, each)
        check_base(config, each)
    check_base(wrong, replace(version, base=str(tiny_model)))


def test_a_scheduler_that_cannot_be_served_is_told_before_the_model_is_loaded(
    config: Config, version: RegisteredModel, tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    index = json.loads((base / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="serve.solver: LCMScheduler cannot be served"):
        check_base(config, replace(version, base=str(base)))
    check_base(changed(config, solver="dpm++"), replace(version, base=str(base)))


def test_a_model_that_is_not_on_this_machine_is_left_to_the_replicas(
    config: Config, version: RegisteredModel
) -> None:
    check_base(config, replace(version, base="s3://bucket/base"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"replicas": 2}, {"num_replicas": 2}),
        ({"replicas": (0, 4)}, {"min_replicas": 0, "initial_replicas": 1, "max_replicas": 4}),
        ({"replicas": (2, 4), "max_batch_size": 16}, {"initial_replicas": 2, "target_ongoing_requests": 16}),
        ({"use_gpu": True, "gpu_share": 0.25}, {"num_gpus": 0.25}),
    ],
)
def test_replicas_are_as_many_as_was_said_each_with_its_share_of_a_gpu(
    config: Config, version: RegisteredModel, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    application = build_application(changed(config, **fields), version)
    (model,) = (each for each in application._bound_deployment.init_args if isinstance(each, Application))
    told = model._bound_deployment
    scaling = told._deployment_config.autoscaling_config
    found = {"num_replicas": told.num_replicas, **(scaling.model_dump() if scaling else {})}
    found |= told.ray_actor_options or {}
    assert {name: found[name] for name in expected} == expected


def test_drift_without_a_reference_is_told(config: Config, version: RegisteredModel, tmp_path: Path) -> None:
    build_application(config, version)
    with pytest.raises(ConfigError, match="serve.drift_pictures: .*is missing; publish the model again"):
        build_application(config, replace(version, source=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"compile": True, "cache_features": True}, "compile cannot be combined with cache_features"),
        ({"drift_pictures": 1}, "drift_pictures: one image is too few"),
        ({"precision": "fp8"}, "precision"),
        ({"offload": "encoders"}, "offload needs use_gpu"),
        (
            {"offload": "model", "use_gpu": True, "compile": True},
            "offload: model cannot be combined with compile",
        ),
        ({"attention": "cudnn"}, "attention: cudnn needs use_gpu"),
        (
            {"attention": "flash", "use_gpu": True, "precision": "fp32"},
            "attention: flash on a GPU needs precision bf16 or fp16",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        ServeConfig.model_validate(fields)


def test_asking_an_endpoint_with_keys_needs_one(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert main(["--config", str(file), "--ask", "1"]) == 2
    assert KEY_VARIABLE in capsys.readouterr().out
